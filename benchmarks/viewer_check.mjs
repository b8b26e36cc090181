// Does the viewer play? Drives the page of a running ns-viewer (or ns-train) in headless Chromium and looks.
//
//     npm install playwright-core
//     ns-viewer --load-config RUN/config.yml --viewer.websocket-port 7133 &
//     node benchmarks/viewer_check.mjs http://127.0.0.1:7133 --out pictures [--chromium /usr/bin/chromium]
//
// Exit code 0 when every check holds; each check prints a line. Needs no graphics card (software WebGL).
import { createRequire } from "node:module";
import { mkdirSync } from "node:fs";
import { resolve } from "node:path";

const { chromium } = createRequire(`${process.cwd()}/`)("playwright-core");
const flag = (name, fallback) => (process.argv.includes(name) ? process.argv[process.argv.indexOf(name) + 1] : fallback);
const address = process.argv[2], out = resolve(flag("--out", "viewer_check"));
mkdirSync(out, { recursive: true });
let failures = 0;
const check = (holds, sentence) => { console.log((holds ? "ok    " : "FAIL  ") + sentence); failures += holds ? 0 : 1; };

const browser = await chromium.launch({
  executablePath: flag("--chromium", "/usr/bin/chromium"),
  args: ["--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"],
  timeout: 120000,
});
const page = await browser.newPage({ viewport: { width: 900, height: 700 } });
page.setDefaultTimeout(120000);
const complaints = [], pictures = [];
// an empty viser 0.2.7 page makes this complaint by itself
const visers = (text) => text.startsWith("THREE.BufferGeometry.computeBoundingSphere(): Computed radius is NaN");
page.on("console", (message) => { if (message.type() === "error" && !visers(message.text())) complaints.push(message.text()); });
page.on("pageerror", (error) => complaints.push(String(error)));
// nerfstudio's page shows its logo from the web; without a network that one request fails
page.on("requestfailed", (request) => console.log(`note  not loaded: ${request.url()}`));
page.on("websocket", (socket) => socket.on("framereceived", ({ payload }) => {
  if (Buffer.from(payload).includes("BackgroundImageMessage")) pictures.push(performance.now());
}));
await page.goto(address);
const text = () => page.evaluate(() => document.body.innerText);
const until = async (holds, seconds = 90) => {
  for (const end = performance.now() + 1000 * seconds; performance.now() < end; await page.waitForTimeout(200)) {
    const value = await holds();
    if (value) return value;
  }
  return false;
};
const frame = async () => Number(/Frame (\d+) of/.exec(await text())?.[1]);
const count = async () => Number(/Frame \d+ of (\d+)/.exec(await text())?.[1]);
const resolution = async () => /Resolution:\s*(\d+x\d+)/.exec(await text())?.[1];
// a click in the page itself: the mouse's would wait for a still page, which software WebGL seldom gives
const press = (name) => page.evaluate((wanted) => {
  const seen = (element) => element.offsetParent !== null;
  [...document.querySelectorAll("button")].find((button) => seen(button) && button.innerText.trim() === wanted).click();
}, name);
// the scene alone, left of the panel
const scene = () => page.screenshot({ clip: { x: 0, y: 60, width: 580, height: 640 } });
// at rest the picture is as large as "Max res" says
const settle = () => until(async () => Math.max(...((await resolution()) ?? "0x0").split("x").map(Number)) >= 500);
const seconds_of = async (seconds, action) => {
  const first = pictures.length, start = performance.now();
  await action(start + 1000 * seconds);
  return (pictures.length - first) / ((performance.now() - start) / 1000);
};

check(await until(frame), "the page shows the Playback panel");
check(await until(() => pictures.length > 0), "the field is rendered");
await settle();
const still = await scene();
await page.screenshot({ path: `${out}/start.png` });
const first = await frame();

await press("Play");
check(await until(async () => (await frame()) !== first), "pressing Play moves the frame counter");
let played = 0;
for (let k = 0; k < 20 && !played; k++) { await page.waitForTimeout(150); played = Buffer.compare(await scene(), still); }
check(played !== 0, "the picture has changed");
await page.screenshot({ path: `${out}/playing.png` });
// pictures of the first rounds are rendered, those of later ones are kept
for (const round of ["at first", "after 12 s", "after 24 s"]) {
  const rate = await seconds_of(6, async (end) => { while (performance.now() < end) await page.waitForTimeout(100); });
  console.log(`note  playing ${round}: ${rate.toFixed(1)} pictures per second at ${await resolution()}`);
  await page.waitForTimeout(6000);
}
await press("Pause");
await settle();
const paused = await frame(), at_rest = await resolution();
await page.waitForTimeout(1500);
check((await frame()) === paused, `Pause stops it (frame ${paused}, ${at_rest} at rest)`);

await press("First frame");
check(await until(async () => (await frame()) === 1), "First frame shows frame 1");
await press("Next frame");
check(await until(async () => (await frame()) === 2), "Next frame shows frame 2");
await press("Previous frame");
check(await until(async () => (await frame()) === 1), "Previous frame shows frame 1 again");
await press("Last frame");
const frames = await count();
check(await until(async () => (await frame()) === frames), `Last frame shows frame ${frames}`);
await settle();

await page.mouse.move(300, 400);
await page.mouse.down();
const turned = await seconds_of(8, async (end) => {
  for (let k = 0; performance.now() < end; k++) {
    await page.mouse.move(300 + 200 * Math.sin(k / 12), 400 + 60 * Math.sin(k / 20));
    await page.waitForTimeout(30);
  }
});
const moving = await resolution();
await page.mouse.up();
check(turned >= 4, `orbiting: ${turned.toFixed(1)} pictures per second at ${moving}`);
await settle();

const shown = {};
for (const channel of ["normals", "distance", "visibility", "confidence", "deformation", "side_by_side", "model_view", "rgb"]) {
  const before = pictures.length;
  await page.getByLabel("Output type").first().click();
  await page.getByRole("option", { name: channel, exact: true }).first().click();
  await until(() => pictures.length > before);
  await settle();
  shown[channel] = await scene();
  await page.screenshot({ path: `${out}/${channel}.png` });
}
const different = new Set(Object.values(shown).map((picture) => picture.toString("base64"))).size;
check(different === Object.keys(shown).length, `each output type looks different (${different} pictures)`);
const ours = complaints.filter((text) => !/ERR_(INTERNET_DISCONNECTED|NAME_NOT_RESOLVED|CONNECTION|PROXY|TUNNEL)/.test(text));
check(ours.length === 0, `no error on the console${ours.map((text) => `\n        ${text}`).join("")}`);
await browser.close();
process.exit(failures ? 1 : 0);
