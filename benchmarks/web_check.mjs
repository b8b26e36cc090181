// Does the exported page play? Opens it from disk in headless Chromium, presses play, scrubs, turns, and looks.
//
//     npm install playwright-core
//     node benchmarks/web_check.mjs OUT/index.html --out pictures [--chromium /usr/bin/chromium]
//
// Exit code 0 when every check holds; each check prints a line. Needs no graphics card (software WebGL).
import { createRequire } from "node:module";
import { mkdirSync, writeFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const { chromium } = createRequire(`${process.cwd()}/`)("playwright-core");
const flag = (name, fallback) => (process.argv.includes(name) ? process.argv[process.argv.indexOf(name) + 1] : fallback);
const page_file = resolve(process.argv[2]), out = resolve(flag("--out", "web_check"));
mkdirSync(out, { recursive: true });
let failures = 0;
const check = (holds, sentence) => { console.log((holds ? "ok    " : "FAIL  ") + sentence); failures += holds ? 0 : 1; };

const browser = await chromium.launch({
  executablePath: flag("--chromium", "/usr/bin/chromium"),
  args: ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"],
  timeout: 120000,
});
const page = await browser.newPage({ viewport: { width: 1000, height: 700 } });
page.setDefaultTimeout(120000);
const complaints = [], asked = [];
page.on("console", (message) => { if (["error", "warning"].includes(message.type())) complaints.push(message.text()); });
page.on("pageerror", (error) => complaints.push(String(error)));
page.on("request", (request) => { if (!/^(file|data|blob):/.test(request.url())) asked.push(request.url()); });
await page.goto(pathToFileURL(page_file).href);
const number = () => page.evaluate(() => Number(/frame (\d+)/.exec(document.getElementById("clock").textContent)?.[1]));
await page.waitForFunction(() => Number(/frame (\d+)/.exec(document.getElementById("clock").textContent)?.[1]) >= 3);
check(true, "it plays by itself");
await page.click("#play");
await page.evaluate(() => { const s = document.getElementById("scrub"); s.value = 0; s.dispatchEvent(new Event("input")); });
await page.waitForTimeout(1500);

const canvas = async (id, name) => {
  const url = await page.evaluate((i) => document.getElementById(i).toDataURL("image/png"), id);
  writeFileSync(`${out}/${name}.png`, Buffer.from(url.split(",")[1], "base64"));
  return url;
};
const clock = () => page.evaluate(() => document.getElementById("clock").textContent);
const colours = (id) => page.evaluate((i) => {
  const copy = document.createElement("canvas");
  copy.width = copy.height = 64;
  const pane = copy.getContext("2d", { willReadFrequently: true });
  pane.drawImage(document.getElementById(i), 0, 0, 64, 64);
  const data = pane.getImageData(0, 0, 64, 64).data;
  let covered = 0; const mean = [0, 0, 0];
  for (let k = 0; k < data.length; k += 4) {
    if (data[k + 3] < 10 || (data[k] > 245 && data[k + 1] > 245 && data[k + 2] > 245)) continue;
    covered++; for (let j = 0; j < 3; j++) mean[j] += data[k + j];
  }
  return { share: covered / 4096, mean: mean.map((x) => x / Math.max(covered, 1)) };
}, id);

const still = await canvas("scene", "scene_start");
await canvas("video", "video_start");
const asset = await colours("scene"), video = await colours("video");
check(asset.share > 0.02, `the asset is drawn (${(100 * asset.share).toFixed(1)} % of its pane)`);
check(video.share > 0.02, `the input video is drawn (${(100 * video.share).toFixed(1)} %)`);
const apart = Math.max(...asset.mean.map((x, i) => Math.abs(x - video.mean[i])));
check(apart < 40 && Math.abs(asset.share - video.share) < 0.1, `both look alike at the start (mean colours ${apart.toFixed(0)} levels apart, coverage ${(100 * Math.abs(asset.share - video.share)).toFixed(1)} % apart)`);

const before = await clock();
await page.click("#play");
for (let k = 0; k < 600 && (await number()) < 4; k++) await page.waitForTimeout(100);
const after = await clock(), moved = await canvas("scene", "scene_played");
await page.click("#play");
check(after !== before, `pressing play moves the clock (${before} to ${after})`);
check(moved !== still, "the asset has moved");
const paused = await clock();
await page.waitForTimeout(500);
check((await clock()) === paused, "pressing it again stops");
await page.evaluate(() => { const s = document.getElementById("scrub"); s.value = s.max; s.dispatchEvent(new Event("input")); });
await page.waitForTimeout(500);
const end = await clock(), shown = /frame (\d+) of (\d+)/.exec(end);
check(shown && shown[1] === shown[2], `scrubbing to the end shows the last frame (${end})`);
const last = await canvas("scene", "scene_last");
await page.hover("#scene");
await page.mouse.down(); await page.mouse.move(420, 260, { steps: 4 }); await page.mouse.up();
await page.waitForTimeout(500);
check((await canvas("scene", "scene_turned")) !== last, "dragging turns it");
await page.click('#show button[value="2"]');
await page.waitForTimeout(500);
await canvas("scene", "scene_confidence");
check(await page.isVisible("#legend"), "confidence has a legend");
await page.screenshot({ path: `${out}/page.png` });
const waiting = await canvas("scene", "scene_waiting");
await page.click("#turn");
await page.waitForTimeout(1000);
check((await canvas("scene", "scene_turning")) !== waiting, "Turn turns it by itself");
await page.setViewportSize({ width: 390, height: 844 });
await page.waitForTimeout(500);
check(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth && document.querySelector(".bar").getBoundingClientRect().bottom <= innerHeight), "all of it fits a phone");
await page.screenshot({ path: `${out}/phone.png` });
check(complaints.length === 0, `nothing on the console${complaints.map((text) => `\n        ${text}`).join("")}`);
check(asked.length === 0, `nothing asked of the network${asked.map((url) => `\n        ${url}`).join("")}`);
await browser.close();
process.exit(failures ? 1 : 0);
