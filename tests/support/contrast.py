"""The contrast of each text of a page, computed from the colours that the browser shows.

The formula is WCAG 2.2's: https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio
"""

from playwright.sync_api import Locator, Page

TEXT = 4.5  # WCAG's level AA
ICON = 3.0
STILL = "*, *::before, *::after { transition: none !important; animation: none !important; }"

# Colours are painted on a canvas and read again, because a computed style may have any notation.
# An element's own opacity fades both its text and its background.
SCRIPT = """
(root, limits) => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => x * a + below[i] * (1 - a));
  const luminance = (colour) => {
    const [r, g, b] = colour.map((x) => (x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => {
    const line = [];
    for (let e = element; e; e = e.parentElement) line.unshift(getComputedStyle(e));
    let colour = [255, 255, 255], opacity = 1;
    for (const style of line) {
      opacity *= Number(style.opacity);
      const [r, g, b, a] = rgba(style.backgroundColor);
      colour = over([r, g, b, a * opacity], colour);
      if (style.backgroundImage.includes("gradient")) colour = over(rgba("magenta"), colour);
    }
    return [colour, opacity];
  };
  const seen = (element) => {
    const box = element.getBoundingClientRect();
    const shown = element.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    return shown && box.width > 1 && box.height > 1;
  };
  const found = [];
  const note = (element, colour, words, fade = 1) => {
    const limit = words ? limits.text : limits.icon;
    const [background, opacity] = behind(element);
    const [r, g, b, a] = rgba(colour);
    const contrast = ratio(over([r, g, b, a * opacity * fade], background), background);
    const where = `${element.tagName.toLowerCase()}.${element.getAttribute("class") ?? ""}`;
    found.push({ contrast, poor: contrast < limit, words: `${words || "icon"} (${where})` });
  };
  for (const element of [root, ...root.querySelectorAll("*")]) {
    if (!seen(element)) continue;
    const style = getComputedStyle(element);
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data).join("").trim();
    if (text && !["STYLE", "SCRIPT"].includes(element.tagName)) note(element, style.color, text);
    if (element.tagName === "svg" && element.closest("button")) note(element, style.color, "");
    if (!["TEXTAREA", "INPUT"].includes(element.tagName) || element.type === "range") continue;
    if (element.value) note(element, style.color, element.value);
    else if (element.placeholder) {
      const placeholder = getComputedStyle(element, "::placeholder");
      note(element, placeholder.color, element.placeholder, Number(placeholder.opacity));
    }
  }
  return found;
}
"""


def contrasts(where: Page | Locator) -> dict[str, float]:
    """The contrast of each visible text, and of each button's icon, on a page or in an element of it."""
    return {part["words"]: round(part["contrast"], 2) for part in _found(where)}


def poor(where: Page | Locator) -> dict[str, float]:
    """Those of them that are too low."""
    return {part["words"]: round(part["contrast"], 2) for part in _found(where) if part["poor"]}


def _found(where: Page | Locator) -> list[dict]:
    root = where.locator("body") if isinstance(where, Page) else where
    return root.evaluate(SCRIPT, {"text": TEXT, "icon": ICON})
