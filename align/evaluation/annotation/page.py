"""The page itself: a gradio app in which people compare two completions with the keyboard.

All text of data is shown as it is, escaped, in elements that scroll. The browser never receives the
names of policies, nor whether a pair is an attention check. Nothing is loaded from the network.

gradio reads the type of a parameter to pass the request, so annotations are no strings here.
"""

import functools
import html
from pathlib import Path
from typing import Any

from align.data.rows import turn_text
from align.errors import DataError, printable
from align.evaluation.annotation.agreement import agreement_line
from align.evaluation.annotation.session import Session, Task, check_name

FOLDER = Path(__file__).parent
TITLE = "Compare completions"
BUTTONS = {
    "left": "Left is better (1)",
    "tie": "Equally good (0)",
    "right": "Right is better (2)",
    "both_bad": "Both bad (b)",
    "skip": "Skip (s)",
}
_MARKUP = str.maketrans({c: f"&#{ord(c)};" for c in "{}$`\\"})  # of the template of `gr.HTML`
_WITH_COMMENT = """(person, number, comment) =>
    [person, number, document.querySelector("#comment textarea, #comment input")?.value ?? comment]"""
"""Inputs of a decision in the browser: gradio copies a text that is written only later."""
# Without gradio's queue a decision is one request, and its result comes with the response.
_ANSWERED_AT_ONCE: dict[str, Any] = {
    "queue": False,
    "api_visibility": "private",
    "show_progress": "hidden",
}
_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def build_page(session: Session, guideline: str) -> Any:
    """The page of a session, as gradio blocks.

    Where a password is needed, the name of the annotator is that of the log-in; otherwise the page
    asks for it.
    """
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.HTML(f'<div tabindex="0">{escaped(guideline)}</div>', elem_id="guideline")
        with gr.Row(elem_id="who", equal_height=True) as who:
            name = gr.Textbox(label="Your name", elem_id="name", autofocus=True, scale=4)
            start = gr.Button("Start", variant="primary", elem_id="start", scale=1)
        person = gr.State("")  # later changes of the name do not count
        pair = gr.HTML("", elem_id="pair")
        with gr.Column(elem_id="decision", visible=False) as decision:
            with gr.Row(elem_id="choices"):
                buttons = {
                    choice: gr.Button(label, elem_id=choice, min_width=100)
                    for choice, label in BUTTONS.items()
                }
            comment = gr.Textbox(
                placeholder="Comment (c), Escape leaves it", elem_id="comment", max_lines=3,
                label="Comment", show_label=False, container=False,
            )  # fmt: skip
        status = gr.HTML("", elem_id="status")
        number = gr.Textbox("", elem_id="number", visible="hidden", label="Number")
        shown = [person, pair, status, number, comment, who, decision]

        controls = _Controls(session)

        def log_in(request: gr.Request) -> list[Any]:
            name = request.username
            return controls.begin(name) if name else [gr.skip()] * len(shown)

        page.load(log_in, outputs=shown, **_ANSWERED_AT_ONCE)
        gr.on([start.click, name.submit], controls.begin, name, shown, **_ANSWERED_AT_ONCE)
        for choice, button in buttons.items():
            button.click(
                functools.partial(controls.decide, choice), [person, number, comment], shown,
                js=_WITH_COMMENT, **_ANSWERED_AT_ONCE,
            )  # fmt: skip
    return page


class _Controls:
    """What events of the page do; each returns the new content of all that is shown."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def show(self, annotator: str, note: str = "") -> list[Any]:
        """The next pair of an annotator."""
        import gradio as gr

        task = self._session.next_task(annotator)
        return [
            annotator,
            _pair_html(task),
            _status_html(self._session, annotator, note),
            "" if task is None else str(task.number),
            "",
            gr.update(visible=False),
            gr.update(visible=task is not None),
        ]

    def begin(self, name: str) -> list[Any]:
        """Start with a name."""
        import gradio as gr

        try:
            return self.show(check_name(name))
        except DataError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def decide(self, choice: str, annotator: str, number: str, comment: str) -> list[Any]:
        """Write a decision about the pair with a number."""
        import gradio as gr

        try:
            known = int(number) if number.isdigit() else -1
            done = self._session.decide(annotator, known, choice, comment)
        except OSError as error:
            raise gr.Error(f"Not saved: {error.strerror}. Free space, then decide again.") from None
        return self.show(annotator, "" if done else "This pair was decided in another window.")


def launch_options() -> dict[str, Any]:
    """Style, keys and theme, as `Blocks.launch` takes them; nothing is loaded from the network."""
    import gradio as gr

    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    return {
        "theme": gr.themes.Base(font=_FONTS, font_mono=("ui-monospace", "monospace")),
        "css": (FOLDER / "page.css").read_text(encoding="utf-8"),
        "head": f"<script>{script}</script>",
        "footer_links": [],
        "ssr_mode": False,
        "share": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "run_history": False,
        "pwa": False,
    }


def escaped(text: str) -> str:
    """Text as HTML without any markup, neither of HTML nor of gradio's templates."""
    shown = printable(text.replace("\r\n", "\n").replace("\r", "\n"))
    return html.escape(shown).translate(_MARKUP)


def _pair_html(task: Task | None) -> str:
    if task is None:
        return '<p id="done">No pair is left for you. Thank you! You can close this page.</p>'
    turns = "".join(
        f'<section class="turn {turn["role"]}"><h2>{turn["role"].capitalize()}</h2>'
        f'<div class="text" tabindex="0">{escaped(turn_text(turn))}</div></section>'
        for turn in task.pair.prompt
    )
    sides = "".join(
        f'<section class="side" aria-label="{side} answer"><h2>{side} <kbd>{key}</kbd></h2>'
        f'<div class="text" tabindex="0">{escaped(text) or "<em>(empty)</em>"}</div></section>'
        for side, key, text in zip(("Left", "Right"), "12", task.sides, strict=True)
    )
    return f'<div class="prompt">{turns}</div><div class="sides">{sides}</div>'


def _status_html(session: Session, annotator: str, note: str) -> str:
    decided, finished, total = session.progress(annotator)
    return (
        f'<div role="status" aria-live="polite">{escaped(note)} {escaped(annotator)}: {decided:,} '
        f'decided. <progress max="{total}" value="{finished}" aria-label="finished pairs"></progress> '
        f"{finished:,} of {total:,} pairs finished. "
        f"{escaped(agreement_line(session.preferences()))}</div>"
    )
