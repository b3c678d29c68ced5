// What stock llama.cpp predicts: node llama_cpp.mjs MODEL.gguf CHUNKS.json OUT.json [F32]
// For every token of every chunk: the probability of the token that follows, and the twenty likeliest.
// Of a chunk that is text, its tokens, special ones too; of {write, count}, so many tokens that follow, each the likeliest.
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [model_path, chunks_path, out, cache] = process.argv.slice(2);
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: model_path, gpuLayers: 0});
const chunks = JSON.parse(readFileSync(chunks_path, "utf8"));
const kind = {experimentalKvCacheKeyType: cache, experimentalKvCacheValueType: cache};
const context = await model.createContext({
    contextSize: Math.max(256, ...chunks.map((chunk) => typeof chunk === "string" ? 0 : (chunk.write ?? chunk).length + 32)),
    flashAttention: false,
    ...(cache ? kind : {}),
});
const sequence = context.getSequence();
const found = [];
for (const chunk of chunks) {
    if (typeof chunk === "string") {
        found.push(model.tokenize(chunk, true));
        continue;
    }
    await sequence.clearHistory();
    if (chunk.write) {
        const written = [];
        for await (const token of sequence.evaluate(chunk.write, {temperature: 0, yieldEogToken: true}))
            if (written.push(token) === chunk.count) break;
        found.push(written);
        continue;
    }
    const asked = chunk.map((token) => [token, {generateNext: {probabilities: true}}]);
    const told = [];
    while (told.length < chunk.length) {  // all probabilities of a few tokens at a time
        const answers = await sequence.controlledEvaluate(asked.slice(told.length, told.length + 32));
        for (const {next: {probabilities}} of answers)
            told.push({
                following: probabilities.get(chunk[told.length + 1]) ?? null,
                likeliest: Array.from({length: 20}, function () { return this.next().value; }, probabilities.entries()),
            });
    }
    found.push(told);
}
writeFileSync(out, JSON.stringify(found));
process.exit(0);
