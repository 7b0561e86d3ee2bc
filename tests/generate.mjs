// What transformers.js writes: generate.mjs LIBRARY FOLDER BUNDLE REQUEST prints { texts, rows } as JSON. FOLDER holds the
// bundle; REQUEST is { prompts, count }. `rows` are of all prompts as one batch, padded on the left.
const [library, folder, bundle, request] = process.argv.slice(2);
const { Tensor, env, pipeline } = await import(library);
const { prompts, count } = JSON.parse(request);
env.localModelPath = folder;
env.allowRemoteModels = false;

const generate = await pipeline("text-generation", bundle);
const options = { max_new_tokens: count, do_sample: false };
const texts = [];
for (const prompt of prompts) texts.push((await generate(prompt, options))[0].generated_text);

const ids = prompts.map((prompt) => [...generate.tokenizer(prompt).input_ids.data]);
const longest = Math.max(...ids.map((row) => row.length));
const padded = (value) => ids.flatMap((row) => [...Array(longest - row.length).fill(0n), ...row.map(value)]);
const batch = (numbers) => new Tensor("int64", BigInt64Array.from(numbers), [ids.length, longest]);
const made = await generate.model.generate({
  input_ids: batch(padded((id) => id)),
  attention_mask: batch(padded(() => 1n)),
  ...options,
});
const rows = made.tolist().map((row) => row.slice(longest).map(Number));
console.log(JSON.stringify({ texts, rows }));
