// Tokens a second of stock llama.cpp: node llama_cpp.mjs MODEL.gguf [OTHER.gguf ...]
// Run it where node-llama-cpp is installed. Models take turns, three rounds; medians.
import {getLlama} from "node-llama-cpp";

const PROMPT = 256, WRITTEN = 32, ROUNDS = 3;
const llama = await getLlama({build: "never", gpu: false, logLevel: "error", maxThreads: 1});
const found = new Map();

function note(path, what, value) {
    const key = `${path}\t${what}`;
    found.set(key, [...(found.get(key) ?? []), value]);
}

async function write(sequence, prompt) {
    let count = 0;
    for await (const _ of sequence.evaluate(prompt, {yieldEogToken: true}))
        if (++count === WRITTEN) break;
}

async function measure(path, together) {
    const model = await llama.loadModel({modelPath: path, gpuLayers: 0});
    const context = await model.createContext({contextSize: 1024, sequences: together, batchSize: 512, threads: 1});
    const prompt = Array.from({length: PROMPT}, (_, place) => 1000 + (place * 7919) % 40000);
    const sequences = Array.from({length: together}, () => context.getSequence());
    let start = performance.now();
    await Promise.all(sequences.map((one) => one.evaluateWithoutGeneratingNewTokens(prompt)));
    note(path, `prefill, ${together} sequences`, together * PROMPT / (performance.now() - start) * 1000);
    start = performance.now();
    await Promise.all(sequences.map((one) => write(one, [1000])));
    note(path, `decoding, ${together} sequences`, together * WRITTEN / (performance.now() - start) * 1000);
    await model.dispose();
}

for (let round = 0; round < ROUNDS; round++)
    for (const together of [1, 8])
        for (const path of process.argv.slice(2))
            await measure(path, together);
for (const [key, values] of found)
    console.log(`${key}\t${values.sort((a, b) => a - b)[Math.floor(ROUNDS / 2)].toFixed(1)}`);
process.exit(0);
