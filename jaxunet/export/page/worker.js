// What takes time, beside the page so that it stays responsive: a picture is read, the model
// sees it, and what it found is drawn. page.js starts this and asks for one task at a time.

// Pixels as they are stored, as Pillow gives them to experiments/predict.py: upright by EXIF,
// no colour profile, and colours of transparent pixels as they are.
const AS_STORED = { premultiplyAlpha: "none", colorSpaceConversion: "none" };
const BAND = 256; // rows read at a time: phones limit how large a canvas may be
const LINE = [255, 216, 0, 255]; // red, green, blue, opacity
const FILL = [255, 216, 0, 70];

/** What the user can mend, or has to know: one sentence. */
class Problem extends Error {}

let ort, session, maxMegapixels;
let found; // of the latest picture: width, height, probability and mask

const tasks = { open, segment, outline, png };
let before = Promise.resolve();

self.onmessage = ({ data: { number, task, given } }) => {
  before = before.then(async () => {
    try {
      const result = await tasks[task](given);
      const bitmaps = Object.values(result).filter((each) => each instanceof ImageBitmap);
      self.postMessage({ number, result }, bitmaps);
    } catch (error) {
      const expected = error instanceof Problem;
      self.postMessage({ number, problem: expected ? error.message : unexpected(error) });
    }
  });
};

function unexpected(error) {
  const memory = error instanceof RangeError || /memory|alloc/i.test(error.message);
  return memory
    ? "There is not enough memory for this picture here. Reload the page, and save it smaller."
    : `This went wrong: ${error.message ?? error}.`; // onnxruntime also throws numbers
}

function tell(stage) {
  self.postMessage({ stage });
}

/** Load the runtime and the model, each only if its hash is the one that the page knows. */
async function open({ model, runtime, ...limits }) {
  if (typeof WebAssembly !== "object") {
    throw new Problem("This browser has no WebAssembly, or it is switched off; without it no " +
      "picture can be segmented here.");
  }
  tell("Loading the model …");
  const [network, code, binary] = await Promise.all(
    [model, runtime.code, runtime.binary].map(fetched));
  const module = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  ort = await import(module);
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1; // more need headers that a plain server does not send
  session = await ort.InferenceSession.create(network, { executionProviders: ["wasm"] });
  ({ maxMegapixels } = limits);
  return {};
}

async function fetched({ url, integrity }) {
  try {
    const response = await fetch(url, { integrity });
    if (!response.ok) throw new Error(`the server says ${response.status}`);
    return new Uint8Array(await response.arrayBuffer());
  } catch (error) {
    throw new Problem(`${url} could not be loaded, or is not the file that this page was made ` +
      `with (${error.message}). Reload the page, or make it anew.`);
  }
}

/** Have the model see a picture; what `outline` gives, and the picture to show. */
async function segment({ file, threshold }) {
  tell(`Reading ${file.name} …`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, AS_STORED);
  } catch {
    throw new Problem(`${file.name} can't be read as a picture by this browser. JPEG, PNG, ` +
      "WebP, GIF and BMP can: save it as one of these.");
  }
  const { width, height } = bitmap;
  if (width * height > maxMegapixels * 1e6) {
    throw new Problem(`${file.name} is ${width} x ${height} pixels; more than ` +
      `${maxMegapixels} megapixels are too many here. Save it smaller.`);
  }
  const { rgb, picture } = await pixels(bitmap, file);
  tell(`Segmenting ${file.name}, ${width} x ${height} pixels …`);
  const image = new ort.Tensor("uint8", rgb, [height, width, 3]);
  const probability = (await session.run({ image })).probability.data;
  if (!probability.every(Number.isFinite)) {
    throw new Problem(`What the model makes of ${file.name} is not finite, and no mask.`);
  }
  found = { width, height, probability };
  return { picture, ...(await outline({ threshold })) };
}

/** Red, green and blue of each pixel, and the picture without its transparency. */
async function pixels(bitmap, file) {
  const { width, height } = bitmap;
  const rgb = new Uint8Array(3 * width * height);
  const canvas = new OffscreenCanvas(width, Math.min(height, BAND));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  for (let top = 0; top < height; top += BAND) {
    const rows = Math.min(BAND, height - top);
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, width, rows);
    if (!copyColours(data, rgb, 3 * width * top)) {
      const stored = await storedPixels(bitmap, file);
      copyColours(stored, rgb, 0);
      for (let at = 3; at < stored.length; at += 4) stored[at] = 255;
      const picture = await createImageBitmap(new ImageData(stored, width, height));
      return { rgb, picture };
    }
  }
  return { rgb, picture: bitmap };
}

/** Copy all but the opacity; whether all of it is opaque. */
function copyColours(rgba, rgb, to) {
  let opaque = 255;
  for (let from = 0; from < rgba.length; from += 4) {
    rgb[to++] = rgba[from];
    rgb[to++] = rgba[from + 1];
    rgb[to++] = rgba[from + 2];
    opaque &= rgba[from + 3];
  }
  return opaque === 255;
}

/** A transparent picture's pixels. A 2D canvas multiplies colours by their opacity, and what
 * is lost then does not come back; a WebGL texture takes them as they are. */
async function storedPixels(bitmap, file) {
  const { width, height } = bitmap;
  const start = await file.slice(0, 4).text();
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  const side = gl?.getParameter(gl.MAX_TEXTURE_SIZE) ?? 0;
  if (start === "GIF8" || Math.max(width, height) > side) { // browsers paint a GIF's black
    throw new Problem(`${file.name} is transparent in parts, which can't be read here ` +
      `${start === "GIF8" ? "from a GIF" : "at this size"}. Save it without transparency.`);
  }
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D,
    gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const rgba = new Uint8ClampedArray(4 * width * height);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(rgba.buffer));
  gl.getExtension("WEBGL_lose_context")?.loseContext(); // a browser keeps only a few
  return rgba;
}

/** The mask at a threshold: how many pixels are lesion, and a layer to lie on the picture. */
async function outline({ threshold }) {
  const { width, height, probability } = found;
  const limit = Math.fround(threshold); // probabilities are float32
  const mask = new Uint8Array(width * height);
  let lesion = 0;
  for (let at = 0; at < mask.length; at++) lesion += mask[at] = probability[at] > limit;
  found.mask = mask;
  return { width, height, lesion, layer: await createImageBitmap(painted(found)) };
}

/** The outline as `predict.py --overlay` draws it, half inside and half outside the edge, and
 * wider in larger pictures: where some, but not all, of the pixels round about are lesion. */
function painted({ width, height, mask }) {
  const reach = Math.max(1, Math.round(Math.max(width, height) / 512));
  const whole = (2 * reach + 1) ** 2;
  const image = new ImageData(width, height);
  const colours = new Uint32Array(image.data.buffer);
  const [line] = new Uint32Array(new Uint8Array(LINE).buffer);
  const [fill] = new Uint32Array(new Uint8Array(FILL).buffer);
  const columns = new Uint16Array(width); // of lesion pixels within reach above and below
  for (let row = -reach; row < height; row++) {
    const enters = row + reach, leaves = row - reach - 1;
    for (let x = 0; x < width; x++) {
      if (enters < height) columns[x] += mask[enters * width + x];
      if (leaves >= 0) columns[x] -= mask[leaves * width + x];
    }
    if (row < 0) continue;
    let around = 0;
    for (let x = -reach; x < width; x++) {
      if (x + reach < width) around += columns[x + reach];
      if (x - reach - 1 >= 0) around -= columns[x - reach - 1];
      if (x < 0 || around === 0) continue;
      const at = row * width + x;
      colours[at] = around < whole ? line : fill;
    }
  }
  return image;
}

/** The mask as `predict.py` writes it: a PNG of one channel, 255 where lesion, else 0. */
async function png() {
  const { width, height, mask } = found;
  const rows = new Uint8Array((width + 1) * height); // each begins with its filter, 0: none
  for (let row = 0; row < height; row++) {
    for (let x = 0; x < width; x++) rows[row * (width + 1) + 1 + x] = -mask[row * width + x];
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 8); // bits; what follows is 0: greyscale, and nothing special
  const signature = new Uint8Array([0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a]);
  return {
    blob: new Blob([
      signature,
      ...chunk("IHDR", new Uint8Array(header.buffer)),
      ...chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
      ...chunk("IEND", new Uint8Array(0)),
    ], { type: "image/png" }),
  };
}

function chunk(name, contents) {
  const body = new Uint8Array(4 + contents.length);
  body.set(new TextEncoder().encode(name));
  body.set(contents, 4);
  return [number(contents.length), body, number(crc32(body))];
}

function number(value) {
  const four = new DataView(new ArrayBuffer(4));
  four.setUint32(0, value);
  return four;
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
