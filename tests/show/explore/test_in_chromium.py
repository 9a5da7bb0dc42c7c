"""The page as a person uses it: in a browser, by pointer, by keyboard, with files, on wide and narrow screens."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ...support.chromium import Page, chromium
from .conftest import answers_of, serving

READY = "document.body && document.body.dataset.ready === 'yes'"
CELL = 0.25  # of the 4 x 4 grid


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    with chromium() as page:
        yield page


@pytest.fixture
def page(browser, server) -> Page:
    return opened(browser, server.url)


def opened(browser: Page, url: str) -> Page:
    browser.complaints.clear()
    browser.size(1200, 900)
    browser.open("about:blank")
    browser.open(url)
    browser.until(READY)
    return browser


def at(patch: int) -> tuple[float, float]:
    """The middle of a patch, as shares of the picture's width and height."""
    return (patch % 4 + 0.5) * CELL, (patch // 4 + 0.5) * CELL


def pixel(page: Page, canvas: str, patch: int) -> list[int]:
    """The color of a picture near the upper left of a patch's middle."""
    x, y = at(patch)
    return page(
        f"(() => {{ const c = document.querySelector({canvas!r}); return [...c.getContext('2d').getImageData("
        f"Math.round({x - 0.04} * c.width), Math.round({y - 0.04} * c.height), 1, 1).data] }})()"
    )


def text(page: Page, selector: str) -> str:
    return page(f"document.querySelector({selector!r}).textContent")


def test_the_page_comes_up_without_an_error(page):
    page.until("document.querySelectorAll('#sheet img').length > 0 && [...document.images].every(i => i.complete)")
    assert page("[...document.images].every(i => i.naturalWidth > 0)")
    assert page.complaints == []
    assert "8 tokens" in text(page, "#facts") and "8 photographs" in text(page, "#facts")


def test_a_click_on_a_patch_shows_its_token_and_others_that_have_it(page, answers):
    page.click("#board", at(6))
    code = answers.sample(0)["codes"][6]
    assert text(page, "#code") == f"Token {code}"
    found = answers.code(code)
    assert f"{found['count']} patches of 8 photographs" in text(page, "#usage")
    expected = [f"/api/patch/{image}/{patch}" for image, patch in found["patches"]]
    page.until(f"document.querySelectorAll('#sheet img').length === {len(expected)}")
    page.until(f"document.querySelector('#sheet img').getAttribute('src') === {expected[0]!r}")
    assert page("[...document.querySelectorAll('#sheet img')].map(i => i.getAttribute('src'))") == expected


def test_the_nearest_patches_follow_the_model_that_is_chosen(page, answers):
    page.click("#board", at(9))
    for model in ("tokenizer", "student"):
        page(f"$('near-model').value = {model!r}; $('near-model').dispatchEvent(new Event('input'))")
        rows = answers.nearest("sample-0", 9, model)["patches"]
        expected = [f"{row['cosine']:.2f}" for row in rows]
        page.until(f"JSON.stringify([...document.querySelectorAll('#nearest figcaption')].map(f => f.textContent)) "
                   f"=== JSON.stringify({expected})")  # fmt: skip


def test_the_pointer_over_a_patch_says_its_token(page, answers):
    left, top, width, height = page.box("#board")
    x, y = at(14)
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + x * width, y=top + y * height)
    page.until("!document.getElementById('tip').hidden")
    assert f"token {answers.sample(0)['codes'][14]} " in text(page, "#tip")


def test_the_token_view_shows_the_colors_of_the_tokens(page, answers):
    page("$('mix').value = 100; $('lines').checked = $('same').checked = false; drawBoard()")
    info, codes = answers.info(), answers.sample(0)["codes"]
    for patch in (0, 5, 13):
        color = info["colors"][codes[patch]]
        assert pixel(page, "#board", patch)[:3] == [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_attention_is_drawn_for_the_chosen_patch(page, answers):
    page.click("#tab-attention")
    page.click("#board", at(3))
    page.until("state.attention !== null && state.patch === 3")
    expected = answers.attention("sample-0", 3, "student", 2)["heads"]
    page.until(f"Math.abs(state.attention.heads[1][7] - {expected[1][7]}) < 1e-6")
    before = pixel(page, "#board", 0)
    page("$('att-head').value = '1'; $('att-head').dispatchEvent(new Event('input'))")
    assert pixel(page, "#board", 0) != before
    assert page("$('att-head').options.length") == 3


def test_hiding_patches_by_dragging_shows_what_the_student_expects(page, answers):
    page.click("#tab-game")
    page.drag("#board", [at(4), at(5), at(6)])
    page.until("state.guesses !== null")
    assert page("[...state.hidden].sort((a, b) => a - b)") == [4, 5, 6]
    said = answers.predict("sample-0", [4, 5, 6])
    assert text(page, "#score b") == f"{said['right']} of 3 right"
    rows = page("[...document.querySelectorAll('#best li')].map(row => row.textContent)")
    assert len(rows) == 5 and rows[0].startswith(f"token {said['codes'][2][0]}")
    assert rows[0].endswith(f"{100 * said['chances'][2][0]:.1f}\u00a0%")
    assert f"true token is {said['true'][2]}" in text(page, "#best-true")
    assert pixel(page, "#board", 5)[:3] == [92, 115, 153], "it is hidden"
    assert pixel(page, "#board", 1)[:3] != [92, 115, 153]
    page.drag("#board", [at(5), at(6)])
    page.until("state.guesses !== null && state.hidden.size === 1")


def test_a_predicted_token_is_shown_by_its_typical_patch(page, answers):
    page.click("#tab-game")
    page.click("#board", at(10))
    page.until("state.guesses !== null")
    said = answers.predict("sample-0", [10])
    for canvas, code in (("#guess", said["codes"][0][0]), ("#truth", said["true"][0])):
        whole = answers.index.typical[code].reshape(-1, 3).astype(float)
        found = pixel(page, canvas, 10)[:3]
        assert (whole.min(0) - 12 <= found).all() and (found <= whole.max(0) + 12).all()
        column, row = 32 * (0.5 - 0.04 / CELL), 32 * (0.5 - 0.04 / CELL)
        near = answers.index.typical[code][int(row) - 1 : int(row) + 2, int(column) - 1 : int(column) + 2].reshape(
            -1, 3
        )
        assert (near.min(0) - 12.0 <= found).all() and (found <= near.max(0) + 12.0).all()


def test_random_blocks_hide_as_many_patches_as_the_training(page, answers):
    page.click("#tab-game")
    page.click("#random")
    page.until("state.guesses !== null")
    assert page("state.hidden.size") == answers.runs.settings.num_masked == 6
    page.click("#clear")
    page.until("document.querySelector('#score b').textContent === 'Hide some patches'")
    assert page("state.hidden.size") == 0


def test_everything_can_be_done_by_keyboard(page, answers):
    page("$('tab-tokens').focus()")
    page.key("ArrowRight")
    assert page("state.mode") == "attention"
    page.key("ArrowRight")
    assert page("state.mode") == "game"
    page.key("Tab")
    assert page("document.activeElement.id") == "board"
    page("state.patch = 0; drawBoard()")
    page.key("ArrowRight")
    page.key("ArrowDown")
    page.key(" ")
    page.until("state.guesses !== null")
    assert page("[...state.hidden]") == [5]
    assert "right" in text(page, "#said"), "what a screen reader says"
    page.key("Enter")
    page.until("state.hidden.size === 0")


@pytest.mark.parametrize("way", ["choose", "drop"])
def test_an_image_of_ones_own_shows_its_tokens(page, answers, root, way):
    file = root / "data" / "test" / "b" / "1.png"
    if way == "choose":
        page.choose_file("#file", file)
    else:
        page.drop_file("main", file)
    page.until("state.image.name === 'your image'")
    assert page("state.image.codes") == answers.add(file.read_bytes())["codes"]
    assert page.complaints == []


def test_an_image_of_ones_own_stays_among_the_others(page, answers, root):
    file = root / "data" / "train" / "a" / "1.png"
    page.choose_file("#file", file)
    page.until("state.image.name === 'your image'")
    own, count = answers.add(file.read_bytes()), page("$('samples').children.length")
    pressed = "[...$('samples').querySelectorAll('[aria-pressed=true]')].map(b => [b.title, b.dataset.key])"
    assert page(pressed) == [["1.png", own["key"]]]
    page.click("#samples button:nth-child(3)")
    page.until("state.image.key === 'sample-1'")
    page.click("#samples button:first-child")
    page.until(f"state.image.key === {own['key']!r}")
    assert page("state.image.codes") == own["codes"]
    page.choose_file("#file", file)
    page.until(f"state.image.key === {own['key']!r}")
    assert page("$('samples').children.length") == count and page.complaints == []


def test_the_pointer_over_a_patch_that_it_hides_says_hidden(page):
    page.click("#tab-game")
    left, top, width, height = page.box("#board")
    x, y = left + at(6)[0] * width, top + at(6)[1] * height
    page.pointer("mouseMoved", x, y)
    page.until("$('tip').textContent === 'seen'")
    for said in ("hidden", "seen"):
        page.pointer("mousePressed", x, y)
        page.pointer("mouseReleased", x, y)
        assert text(page, "#tip") == said
    page.pointer("mousePressed", x, y)
    page.pointer("mouseReleased", x, y)
    page("$('clear').click()")
    assert text(page, "#tip") == "seen"


@pytest.mark.parametrize("mode", ["tokens", "attention", "game"])
def test_the_controls_are_on_a_laptop_s_screen(browser, server, mode):
    page = opened(browser, f"{server.url}#mode={mode}")
    page.size(1366, 650)  # what a browser leaves of 768
    page.until("innerHeight === 650")
    page("scrollTo(0, 0)")
    assert page("$('controls').getBoundingClientRect().bottom") <= 650
    assert page("$('board').getBoundingClientRect().width") >= 300


def test_a_file_that_is_no_image_is_said_to_be_none(page, tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("no image")
    page.choose_file("#file", file)
    page.until("!document.getElementById('error').hidden")
    assert "no image that can be read" in text(page, "#error")
    assert page("state.image.key") == "sample-0", "the image before stays"


def test_the_address_remembers_what_is_shown(browser, server):
    page = opened(browser, f"{server.url}#sample=2&mode=game&hidden=1.2.3&patch=2")
    page.until("state.guesses !== null")
    assert page("[state.image.key, state.mode, state.patch, [...state.hidden]]") == ["sample-2", "game", 2, [1, 2, 3]]
    assert opened(browser, f"{server.url}#sample=999&mode=x&hidden=a.99&patch=-4")("state.mode") == "tokens"


@pytest.mark.parametrize("mode", ["tokens", "attention", "game"])
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_is_wider_than_the_screen(browser, server, width, mode):
    page = opened(browser, f"{server.url}#mode={mode}&hidden=1.2.3")
    page.size(width, 800)
    page.until(f"innerWidth === {width}")
    assert page("document.documentElement.scrollWidth") == width
    assert page("document.getElementById('board').getBoundingClientRect().width") > 0.45 * min(width, 1200) - 60


def test_a_tokenizer_alone_has_no_mask_game_and_the_page_says_so(browser, root):
    for server in serving(answers_of(root / "tokenizer")):
        page = opened(browser, server.url + "#mode=game")
        assert page("[$('tab-game').hidden, $('problem').hidden, state.mode]") == [True, False, "tokens"]
        assert "no mask game" in text(page, "#problem")
