// Runs in a page: uses its first chart, and looks for what axe would report. Leaves its findings in the title.
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map((part) => (part /= 255) <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const rgb = (text) => text.match(/[\d.]+/g).map(Number);
const background = (element) => {
  for (; element; element = element.parentElement) {
    const color = rgb(getComputedStyle(element).backgroundColor);
    if (color.length === 3) return color;
  }
  return [255, 255, 255];
};
const isSeen = (element) => element.checkVisibility() && getComputedStyle(element).clipPath === "none";
const problems = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let texts = 0;
for (let node = walker.nextNode(); node; node = walker.nextNode()) {
  const element = node.parentElement;
  if (!node.textContent.trim() || !isSeen(element) || element.closest("script, .tip")) continue;
  texts += 1;
  const style = getComputedStyle(element);
  const [one, two] = [rgb(style.color), background(element)].map(luminance).sort((a, b) => b - a);
  const ratio = (one + 0.05) / (two + 0.05);
  if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) {
    problems.push(`contrast ${ratio.toFixed(2)} of ${node.textContent.trim().slice(0, 20)}`);
  }
}
for (const path of document.querySelectorAll(".plot path.smooth, .plot path.plain, .plot path.marks")) {
  const [one, two] = [rgb(getComputedStyle(path).stroke), background(path.closest(".card"))].map(luminance).sort((a, b) => b - a);
  if ((one + 0.05) / (two + 0.05) < 3) problems.push(`contrast of a curve ${path.className.baseVal}`);
}
const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
if (new Set(ids).size < ids.length) problems.push("an id occurs twice");
const levels = [...document.querySelectorAll("h1, h2, h3, h4, h5")].map((heading) => +heading.tagName[1]);
levels.forEach((level, at) => { if (level > (levels[at - 1] ?? 0) + 1) problems.push(`h${level} after h${levels[at - 1]}`); });
for (const name of ["input", "svg[role=img]", "[role=group]", "section"]) {
  for (const element of document.querySelectorAll(name)) {
    const label = element.getAttribute("aria-label") || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent;
    if (!label?.trim()) problems.push(`${name} has no name`);
  }
}
const landmarks = [...document.querySelectorAll("section")].map((section) => section.getAttribute("aria-labelledby"));
if (new Set(landmarks).size < landmarks.length) problems.push("two sections have one name");
for (const child of document.querySelectorAll("dl > div > *")) if (!/^D[DT]$/.test(child.tagName)) problems.push(`${child.tagName} in dl`);
for (const table of document.querySelectorAll("table")) {
  if (!table.caption?.textContent || [...table.querySelectorAll("th")].some((cell) => !cell.scope)) problems.push("a table has no caption or scope");
}
for (const element of document.querySelectorAll("body *")) {
  if (element.scrollWidth > element.clientWidth + 1 && getComputedStyle(element).overflowX === "auto" && element.tabIndex < 0) {
    problems.push(`${element.className} scrolls but cannot be reached by the keyboard`);
  }
}
const plot = document.querySelector(".plot"), slider = plot.querySelector("input"), tip = plot.querySelector(".tip");
const closed = getComputedStyle(tip).display;
slider.focus();
slider.value = 2;
slider.dispatchEvent(new Event("input"));
const byKey = { spoken: slider.getAttribute("aria-valuetext"), shown: tip.textContent, display: getComputedStyle(tip).display };
slider.blur();
const box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 1, clientY: box.top + 5 }));
const byPointer = tip.textContent;
plot.dispatchEvent(new PointerEvent("pointerleave"));
document.title = JSON.stringify({
  problems, texts, closed, byKey, byPointer, left: getComputedStyle(tip).display, steps: +slider.max,
  width: innerWidth, page: document.documentElement.scrollWidth,
});
