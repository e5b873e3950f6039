"""The first completions of every model stand beside each other, as they are."""

from rich.console import Console

from madpo.trainer.reports.samples import LONGEST, side_by_side


def printed(rows, count=4):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(side_by_side(rows, count))
    return capture.get()


def test_models_stand_side_by_side_with_their_scores():
    rows = [
        {
            "prompt": f"prompt {i}",
            "completions": [f"old {i}", f"other old {i}", f"new {i}", f"other new {i}"],
            "models": ["start", "start", "runs/my", "runs/my"],
            "scores": [-1.25, 0.0, None, 0.0],
        }
        for i in range(3)
    ]
    text = printed(rows, count=2)
    line = next(line for line in text.splitlines() if "prompt 1" in line)
    assert "old 1  [-1.25]" in line and "new 1 " in line and "None" not in line
    assert "start" in text and "runs/my" in text
    assert "prompt 2" not in text and "other" not in text


def test_texts_are_shown_as_they_are_on_one_line_and_cut():
    message = [{"role": "user", "content": "earlier"}, {"role": "user", "content": "[bold]two\nlines[/]"}]
    row = {"prompt": message, "completions": ["x" * (LONGEST + 1)], "models": ["m"]}
    text = printed([row])
    assert "[bold]two lines[/]" in text and "earlier" not in text
    assert text.count("x") == LONGEST and "..." in text
