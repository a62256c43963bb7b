"""What a browser computed of a page: contrasts, sizes, what lies beside the window."""

from typing import Any

_CONTRASTS = """
  const channels = (colour) => {
    const parts = colour.match(/[\\d.]+/g).map(Number);
    return parts.length === 3 ? [...parts, 1] : parts;
  };
  const luminance = (rgb) => {
    const [r, g, b] = rgb.slice(0, 3).map((value) => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (one, other) => {
    const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
    return (light + 0.05) / (dark + 0.05);
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error(`half transparent: ${at.tagName}`);
    }
    throw new Error("no background");
  };
  const name = (element) => `${element.tagName} ${element.id || element.className}`;
  const shown = (element) => element.checkVisibility() && !element.disabled;
  const text = [], borders = [];
  for (const element of document.body.querySelectorAll("*")) {
    const control = element.matches("input, textarea, button");
    const words = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!shown(element) || element.closest(".hidden")) continue;
    const style = getComputedStyle(element);
    const back = behind(element);
    if (words || control) text.push([name(element), ratio(channels(style.color), back)]);
    if (element.placeholder) {
      const own = getComputedStyle(element, "::placeholder").color;
      text.push([`${name(element)} placeholder`, ratio(channels(own), back)]);
    }
    if (control || element.id === "log") {
      const border = channels(style.borderTopColor);
      borders.push([name(element), ratio(border, behind(element.parentElement))]);
    }
  }
  return [text, borders];
"""


def contrasts(browser: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Contrast ratios by element: of texts with their ground, of borders with what is around.

    What is switched off or out of sight is left out.
    """
    texts, borders = browser.execute_script(_CONTRASTS)
    return dict(texts), dict(borders)


def use_scheme(browser: Any, scheme: str) -> None:
    """Shows pages in the "light" or "dark" colour scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def use_window(browser: Any, width: int, height: int) -> None:
    """Shows pages in a window of so many CSS pixels."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def targets(browser: Any) -> dict[str, tuple[float, float]]:
    """Width and height of everything that is pressed or typed in, in CSS pixels."""
    found = browser.execute_script("""
      return [...document.querySelectorAll("input, textarea, button, summary")].map((element) => {
        const { width, height } = element.getBoundingClientRect();
        return [element.id || element.tagName, [width, height]];
      });
    """)
    return {name: tuple(size) for name, size in found}


def overflow(browser: Any) -> float:
    """By how many CSS pixels the page is wider than the window."""
    return browser.execute_script(
        "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    )
