"""The page of the server, driven in a real browser: it chats, tells speed and states, and obeys
nothing that a text says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, needs_chromium
from serving import Served
from tiny_bundle import JETSON, make_bundle, pack

HOSTILE = "<img src=x onerror=\"document.title='taken'\"><b>so</b>"

# Waits by requests, since the browser's clock stands still as long as one is open.
DRIVER = """
(async () => {
  const wait = () => fetch("/health");
  while (!model) await wait();
  at("temperature").value = "0";
  at("tokens").value = "12";
  for (const text of [HOSTILE, "and then"]) {
    at("text").value = text;
    at("ask").requestSubmit();
    await wait();
    while (running) await wait();
  }
  at("memory").open = true;
  at("name").value = "kept";
  at("save").requestSubmit();
  while (!at("states").children.length) await wait();
  const whole = document.documentElement;
  document.body.setAttribute("data-found", JSON.stringify({
    said: [...document.querySelectorAll(".said")].map((each) => each.firstChild.data),
    told: [...document.querySelectorAll(".said small")].map((each) => each.textContent),
    speed: at("speed").textContent,
    states: [...at("states").children].map((each) => each.textContent),
    title: document.title,
    images: document.images.length,
    wide: whole.scrollWidth - whole.clientWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    paper: getComputedStyle(document.body).backgroundColor,
  }));
})();
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = make_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    chat = {"templates": {"default": template}, "special_tokens": {}}
    (folder / "chat.json").write_text(json.dumps(chat))
    with (folder / "runtime/serve/page/page.js").open("a") as file:
        file.write(DRIVER.replace("HOSTILE", json.dumps(HOSTILE)))
    pack(folder)
    with Served(folder) as server:
        yield server


@needs_chromium
@pytest.mark.parametrize(
    ("width", "options"),
    [(1200, []), (500, ["--blink-settings=preferredColorScheme=0"])],
    ids=["wide and light", "narrow and dark"],
)
def test_a_chat_in_a_browser(
    served: Served, tmp_path: Path, width: int, options: list[str]
) -> None:
    dom = chromium(f"{served.url}/", tmp_path, width, "--virtual-time-budget=3000", *options)
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found, dom
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    asked = {"messages": [{"role": "user", "content": HOSTILE}], "temperature": 0, "max_tokens": 12}
    _, answer, _ = served.ask("/v1/chat/completions", asked)
    assert seen["said"][:3] == [HOSTILE, answer["choices"][0]["message"]["content"], "and then"]
    assert len(seen["told"]) == 2 and "12 new" in seen["told"][1]
    assert re.search(r"[1-9]\d* of them from a state", seen["told"][1])
    assert seen["speed"].endswith("tokens/s")
    assert len(seen["states"]) == 1 and seen["states"][0].startswith("kept")
    assert seen["images"] == 0 and seen["title"] == served.model
    assert seen["wide"] == 0, "the page scrolls sideways"
    assert seen["dark"] is bool(options)
    assert seen["paper"] == ("rgb(22, 21, 19)" if options else "rgb(251, 250, 248)")


def test_the_page_asks_nobody_else() -> None:
    """Neither an address nor a script in the text, so that the policy forbids it nothing."""
    page = JETSON / "runtime/serve/page"
    for file in sorted(page.iterdir()):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"https?://|//[a-z]+\.|innerHTML|outerHTML|eval\(", text), file.name
        assert not re.search(r"<script(?! src=)|\son\w+=|style=", text), file.name


def test_what_the_page_comes_with(served: Served) -> None:
    for path, kind in (("/", "html"), ("/page.css", "css"), ("/page.js", "javascript")):
        status, _, headers = served.ask(path)
        assert status == 200 and kind in headers["content-type"]
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert headers["x-content-type-options"] == "nosniff"
