// Runs an ONNX file of segjax (--with-preprocessing --with-argmax) in the browser, with onnxruntime-web.
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;

/** Loads a model: {session, metadata}. `metadata` has what segjax wrote into the file: classes, colors and others. */
export async function load(url) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const metadata = metadataOf(bytes);
  if (metadata.output !== "labels" || !metadata.normalisation?.inside) {
    throw new Error(`${url}: export it with --with-preprocessing --with-argmax`);
  }
  return { session: await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] }), metadata };
}

/** The label of each pixel of an ImageData, Uint8Array or Int32Array of height * width. */
export async function labels({ session, metadata }, { data, width, height }) {
  // Some models take multiples of a size only: as in `segjax predict`, the mean colour fills the right and the bottom.
  const multiple = metadata.size_multiple;
  const [rows, columns] = [height, width].map((length) => Math.ceil(length / multiple) * multiple);
  const mean = metadata.normalisation.mean.map(Math.round);
  const rgb = new Uint8Array(rows * columns * 3).map((_, place) => mean[place % 3]);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const pixel = 4 * (y * width + x);
      rgb.set(data.subarray(pixel, pixel + 3), 3 * (y * columns + x));
    }
  }
  const images = new ort.Tensor("uint8", rgb, [1, rows, columns, 3]);
  const found = (await session.run({ images })).labels.data;
  return found.slice(0, width * height).map((_, place) => found[Math.floor(place / width) * columns + (place % width)]);
}

/** The pixels of a file or URL that the browser can show, reduced to at most `side` pixels a side. */
export async function pixels(blob, side = Infinity) {
  const image = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const scale = Math.min(1, side / Math.max(image.width, image.height));
  const [width, height] = [image.width, image.height].map((length) => Math.max(1, Math.round(length * scale)));
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

// ONNX files are protocol buffers. Field 14 of the outermost message holds pairs of a key (1) and a value (2).
function metadataOf(bytes) {
  const metadata = {};
  for (const [field, value] of fieldsOf(bytes)) {
    if (field !== 14) continue;
    const pair = Object.fromEntries(fieldsOf(value).map(([key, text]) => [key, new TextDecoder().decode(text)]));
    try {
      metadata[pair[1]] = JSON.parse(pair[2]);
    } catch {
      // An entry of another program.
    }
  }
  return metadata;
}

function fieldsOf(bytes) {
  const fields = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let factor = 1; ; factor *= 128) {
      if (at >= bytes.length) throw new Error("the file is no ONNX model, or it is truncated");
      const byte = bytes[at++];
      value += (byte & 127) * factor;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    const length = kind === 2 ? varint() : kind === 1 ? 8 : kind === 5 ? 4 : 0;
    if (kind === 0) varint();
    if (kind === 2) fields.push([Math.floor(tag / 8), bytes.subarray(at, at + length)]);
    at += length;
  }
  return fields;
}
