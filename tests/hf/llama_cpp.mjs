// What stock llama.cpp predicts: node llama_cpp.mjs MODEL.gguf CHUNKS.json OUT.json [F32]
// For every token of every chunk: the probability of the token that follows, and the twenty likeliest.
// Of a chunk that is text, its tokens.
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [model_path, chunks_path, out, cache] = process.argv.slice(2);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error"});
const model = await llama.loadModel({modelPath: model_path, gpuLayers: 0});
const chunks = JSON.parse(readFileSync(chunks_path, "utf8"));
const kind = {experimentalKvCacheKeyType: cache, experimentalKvCacheValueType: cache};
const context = await model.createContext({
    contextSize: Math.max(256, ...chunks.map((chunk) => typeof chunk === "string" ? 0 : chunk.length + 8)),
    flashAttention: false,
    ...(cache ? kind : {}),
});
const sequence = context.getSequence();
const found = [];
for (const chunk of chunks) {
    if (typeof chunk === "string") {
        found.push(model.tokenize(chunk));
        continue;
    }
    await sequence.clearHistory();
    const asked = chunk.map((token) => [token, {generateNext: {probabilities: true}}]);
    const answers = await sequence.controlledEvaluate(asked);
    found.push(answers.map(({next}, place) => ({
        following: next.probabilities.get(chunk[place + 1]) ?? null,
        likeliest: [...next.probabilities].slice(0, 20),
    })));
}
writeFileSync(out, JSON.stringify(found));
process.exit(0);
