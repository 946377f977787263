// The page: takes a picture, has worker.js segment it, and shows what it found.

const $ = (id) => document.getElementById(id);
const settings = JSON.parse($("settings").textContent);

let worker;
const waiting = new Map();
let asked = 0;
let threshold = settings.threshold;
let shown; // of the latest picture: name, width, height, lesion
let busy = 0; // pictures on their way; the worker takes them one after another

function say(text, isProblem = false) {
  $("status").textContent = text;
  $("status").classList.toggle("problem", isProblem);
}

async function start() {
  if (location.protocol === "file:") {
    throw new Error("Browsers load no model into a page opened as a file. In its folder, run " +
      "python -m http.server and open http://localhost:8000 instead.");
  }
  // A worker from a blob is bound by this page's policy, which says what it may connect to; one
  // from a file would not be.
  const code = await (await fetch("worker.js")).blob();
  worker = new Worker(URL.createObjectURL(code), { type: "module" });
  worker.onmessage = ({ data: { stage, number, problem, result } }) => {
    if (stage) return say(stage);
    const { resolve, reject } = waiting.get(number);
    waiting.delete(number);
    return problem ? reject(new Error(problem)) : resolve(result);
  };
  worker.onerror = () => {
    for (const { reject } of waiting.values()) reject(new Error("This browser is too old " +
      "for this page: it needs module workers and OffscreenCanvas."));
    waiting.clear();
  };
  await ask("open", { ...settings, model: whole(settings.model), runtime: {
    code: whole(settings.runtime.code), binary: whole(settings.runtime.binary) } });
  if (!busy) say("Ready: choose a picture.");
}

function whole({ url, integrity }) { // the worker has no address that others start from
  return { url: new URL(url, document.baseURI).href, integrity };
}

function ask(task, given = {}) {
  const number = ++asked;
  worker.postMessage({ number, task, given });
  return new Promise((resolve, reject) => waiting.set(number, { resolve, reject }));
}

async function take(files) {
  const [file] = files;
  if (!file) return;
  $("busy").hidden = !++busy;
  try {
    await ready;
    const asked = threshold;
    show(file.name, await ask("segment", { file, threshold }));
    const others = files.length > 1 ? ` Of ${files.length} files, the first was taken.` : "";
    say(`${file.name} is done, ${percent()} of it lesion.${others}`);
    if (threshold !== asked) outline();
  } catch (error) {
    say(error.message, true);
  } finally {
    $("busy").hidden = !--busy;
  }
}

async function takeSample(name) {
  try {
    const blob = await (await fetch(name)).blob();
    await take([new File([blob], name, { type: blob.type })]);
  } catch (error) {
    say(`${name} could not be loaded (${error.message}).`, true);
  }
}

function show(name, { picture, layer, width, height, lesion }) {
  shown = { name, width, height, lesion };
  draw($("picture"), picture);
  $("picture").setAttribute("aria-label", `${name}, ${width} by ${height} pixels`);
  $("view").style.setProperty("--width", width);
  $("view").style.setProperty("--height", height);
  $("result").hidden = false;
  showLayer(layer, lesion);
  $("result").scrollIntoView({ block: "nearest" });
}

function showLayer(layer, lesion) {
  shown.lesion = lesion;
  draw($("layer"), layer);
  $("layer").setAttribute("aria-label", `The lesion's outline: ${area()}`);
  $("area").textContent = area();
}

function draw(canvas, bitmap) {
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.getContext("bitmaprenderer").transferFromImageBitmap(bitmap);
}

function area() {
  const { width, height, lesion } = shown;
  const [part, all] = [lesion, width * height].map((count) => count.toLocaleString("en"));
  return `${part} of ${all} pixels are lesion, ${percent()}`;
}

function percent() {
  return `${((100 * shown.lesion) / (shown.width * shown.height)).toFixed(1)}%`;
}

let outlining = false;
let wanted = false;

async function outline() { // while one is drawn, the slider may move on: then once more
  if (!shown) return;
  wanted = true;
  if (outlining) return;
  outlining = true;
  try {
    while (wanted) {
      wanted = false;
      const { layer, lesion } = await ask("outline", { threshold });
      showLayer(layer, lesion);
    }
    say(`Above ${threshold}, ${percent()} of ${shown.name} is lesion.`);
  } catch (error) {
    say(error.message, true);
  } finally {
    outlining = false;
  }
}

function setThreshold(value) {
  threshold = value;
  $("threshold").value = 100 * value;
  $("threshold-value").textContent = value;
  $("threshold").setAttribute("aria-valuetext", value);
  outline();
}

function setOpacity(percent) {
  $("opacity").value = percent;
  $("opacity-value").textContent = `${percent}%`;
  $("opacity").setAttribute("aria-valuetext", `${percent}%`);
  $("layer").style.opacity = percent / 100;
}

function press(button, on = button.getAttribute("aria-pressed") !== "true") {
  button.setAttribute("aria-pressed", on);
  $("view").classList.toggle(button.id, on);
}

async function save() {
  const { blob } = await ask("png");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  // As pathlib's stem: all but the last ending.
  link.download = `${shown.name.replace(/(.)\.[^.]+$/, "$1")}_segmentation.png`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  say(`${link.download} is in your downloads.`);
}

for (const input of [$("file"), $("camera")]) {
  input.addEventListener("change", () => {
    take([...input.files]);
    input.value = ""; // so that the same file can be chosen again
  });
}
for (const button of document.querySelectorAll("[data-sample]")) {
  button.addEventListener("click", () => takeSample(button.dataset.sample));
}
document.addEventListener("paste", (event) => take([...event.clipboardData.files]));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take([...event.dataTransfer.files]);
});
$("threshold").addEventListener("input", () => setThreshold($("threshold").value / 100));
$("reset").addEventListener("click", () => setThreshold(settings.threshold));
$("opacity").addEventListener("input", () => setOpacity($("opacity").value));
$("alone").addEventListener("click", () => press($("alone")));
$("actual").addEventListener("click", () => press($("actual")));
$("download").addEventListener("click", () => save().catch((e) => say(e.message, true)));

setThreshold(settings.threshold);
setOpacity(100);
const ready = start();
ready.catch((error) => say(error.message, true));
