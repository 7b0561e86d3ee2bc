// A bundle in the browser: ONNX Runtime's WebAssembly runs its files as they are.
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // more need a page that is isolated from others

export class Model {
  /** The file `name` of the bundle at `folder`, which ends with a slash. */
  static async open(folder, name = "model.onnx") {
    const data = "model.onnx.data";
    const session = await ort.InferenceSession.create(folder + name, {
      executionProviders: ["wasm"],
      externalData: [{ path: data, data: folder + data }],
    });
    return new Model(session);
  }

  constructor(session) {
    this.session = session;
    this.vocabulary = session.outputMetadata.find((output) => output.name === "logits").shape[2];
    this.caches = session.inputMetadata.filter((input) => input.name.startsWith("past_key_values."));
    this.clear();
  }

  /** Forget all tokens. */
  clear() {
    this.past = 0;
    this.cache = this.caches.map(({ type, shape }) => {
      const sizes = [1, shape[1], 0, shape[3]];
      return new ort.Tensor(type, new Float32Array(0), sizes);
    });
  }

  /** Logits [S, V] as one array, of tokens that follow those before; `model.ort.onnx` gives the last token's alone. */
  async step(ids) {
    const total = this.past + ids.length;
    const positions = ids.map((_, place) => this.past + place);
    const feeds = {
      input_ids: integers(ids),
      attention_mask: integers(new Array(total).fill(1)),
      position_ids: integers(positions),
    };
    this.caches.forEach(({ name }, place) => (feeds[name] = this.cache[place]));
    const results = await this.session.run(feeds);
    this.cache = this.caches.map(({ name }) => results[name.replace("past_key_values", "present")]);
    this.past = total;
    return results.logits.data;
  }

  /** Greedy tokens after a prompt of ids, at most `count`, up to one of `ends`. */
  async *generate(prompt, count, ends = []) {
    this.clear();
    let ids = prompt;
    for (let made = 0; made < count; made++) {
      const token = largest(await this.step(ids), this.vocabulary);
      if (ends.includes(token)) return;
      yield token;
      ids = [token];
    }
  }
}

function integers(numbers) {
  return new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);
}

/** Where the largest of the last `size` numbers is among them. */
function largest(numbers, size) {
  const start = numbers.length - size;
  let best = 0;
  for (let place = 1; place < size; place++) {
    if (numbers[start + place] > numbers[start + best]) best = place;
  }
  return best;
}
