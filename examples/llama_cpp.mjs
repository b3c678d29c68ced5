// Seconds that stock llama.cpp takes, for llama_cpp.py: node llama_cpp.mjs MODEL.gguf [OTHER.gguf ...]
// For a prompt of 256 tokens, the fastest of seven, and for a token that it writes then, of 448 the one at the fastest
// tenth: other work of the machine only adds to them. The models take turns.
import {getLlama} from "node-llama-cpp";

const PROMPT = 256, WRITTEN = 64, ROUNDS = 7;
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: 1});
const found = Object.fromEntries(process.argv.slice(2).map((path) => [path, {prompt: [], token: []}]));
for (let round = 0; round < ROUNDS; round++)
    for (const [path, seconds] of Object.entries(found)) {
        const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
        const context = await model.createContext({contextSize: 512, batchSize: 512, threads: 1});
        const sequence = context.getSequence();
        const prompt = Array.from({length: PROMPT}, (_, place) => 3 + (place * 7919) % 200);
        await sequence.evaluateWithoutGeneratingNewTokens(prompt.slice(0, 32));
        await sequence.clearHistory();
        let last = performance.now(), count = 0;
        await sequence.evaluateWithoutGeneratingNewTokens(prompt);
        seconds.prompt.push((performance.now() - last) / 1000);
        last = performance.now();
        for await (const _ of sequence.evaluate([3], {temperature: 0, yieldEogToken: true})) {
            const now = performance.now();
            seconds.token.push((now - last) / 1000);
            last = now;
            if (++count === WRITTEN) break;
        }
        await model.dispose();
    }
for (const {prompt, token} of Object.values(found)) {
    token.sort((a, b) => a - b);
    console.log(JSON.stringify({prompt: Math.min(...prompt), token: token[Math.floor(token.length / 10)]}));
}
process.exit(0);
