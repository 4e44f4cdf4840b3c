"""The pictures show the columns they are given, the same bytes every time."""

from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from sim.paths import CONF
from sim.views import plots
from sim.views.names import hardware_name, model_name, policy_name, stack_name
from sim.views.plots import plot_stall_against_residency, plot_timeline, plot_tpot_bars, save
from sim.views.timeline import Frames, Timeline, load_timeline
from tests.unit.views.support import by_hand, run

POLICIES = ["on_demand", "lru", "adaptive"]
NAMES = ["on demand", "LRU", "adaptive (ExpertFlow)"]


def table(panels: list[tuple[str, str]]) -> pd.DataFrame:
    """Stall falls with residency to zero at 1.0; a third of it is late."""
    rows = []
    for hardware, stack in panels:
        for index, policy in enumerate(POLICIES):
            for residency in (0.25, 0.5, 1.0):
                stall = (1.0 - residency) * 30.0 / (1 + index)
                rows.append(
                    {
                        "policy": policy,
                        "hardware": hardware,
                        "stack": stack,
                        "residency": residency,
                        "tpot_ms": 12.0 + stall,
                        "stall_ms_per_token": stall,
                        "late_ms_per_token": stall / 3,
                        "miss_ms_per_token": stall * 2 / 3,
                        "hit_rate": residency,
                        "link_utilisation": 0.5,
                    }
                )
    return pd.DataFrame(rows)


FOUR = [("a100", "eager"), ("a100", "graph"), ("h200", "eager"), ("h200", "graph")]


def points(line: Any) -> list[tuple[float, float]]:
    """What a line joins, in order. (Matplotlib's own types admit any array-like here.)"""
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def bars(axes: Any) -> list[list[Any]]:
    return [list(container) for container in axes.containers]


def frames(folder: Path, horizon: bool = True) -> Frames:
    timeline = Timeline("adaptive", 4)
    run(by_hand(), 4, 3, [timeline], prefetch=horizon)
    if horizon:
        for now_ns, reach in [(100, 1), (2250, 2), (4430, 3), (6300, 1)]:
            timeline.horizon(now_ns, range(1, reach + 1))
    timeline.write(folder / "timeline.json")
    return load_timeline(folder / "timeline.json")


# -- stall against residency ---------------------------------------------------------------------------------


def test_one_line_per_policy_in_every_panel() -> None:
    figure = plot_stall_against_residency(table(FOUR))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "A100, eager stack",
        "H200, eager stack",
        "A100, graph stack",
        "H200, graph stack",
    ]
    for axes in figure.axes:
        assert [line.get_label() for line in axes.lines] == POLICIES
    assert points(figure.axes[0].lines[1]) == [(0.25, 11.25), (0.5, 7.5), (1.0, 0.0)]


def test_the_legend_names_the_policies_and_the_axes_the_units() -> None:
    figure = plot_stall_against_residency(table(FOUR))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == NAMES
    assert figure.axes[0].get_xlabel() == "residency (share of all experts)"
    assert figure.axes[0].get_ylabel() == "stall (ms per token)"
    late = plot_stall_against_residency(table(FOUR), value="late_ms_per_token")
    assert late.axes[0].get_ylabel() == "late stall (ms per token)"


@pytest.mark.parametrize("log_y", [False, True])
def test_every_point_lies_within_its_axes_zero_too(log_y: bool) -> None:
    figure = plot_stall_against_residency(table(FOUR), log_y=log_y)
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert low == 0.0
        assert all(low <= value <= high for line in axes.lines for _, value in points(line))
        assert axes.get_yscale() == ("symlog" if log_y else "linear")


def test_points_are_joined_in_order_of_residency() -> None:
    shuffled = table(FOUR[:1]).sample(frac=1.0, random_state=1)
    line = plot_stall_against_residency(shuffled).axes[0].lines[0]
    assert [residency for residency, _ in points(line)] == [0.25, 0.5, 1.0]


def test_policies_differ_in_more_than_colour() -> None:
    styles = [tuple(plots._line_style(index).values()) for index in range(21)]
    assert len(set(styles)) == 21
    assert len({style[1:] for style in styles}) == 21


def test_a_panel_without_rows_stays_empty() -> None:
    figure = plot_stall_against_residency(table(FOUR[:3]))
    shown = [axes.get_title(loc="left") for axes in figure.axes if axes.axison]
    assert shown == ["A100, eager stack", "H200, eager stack", "A100, graph stack"]


# -- bars ----------------------------------------------------------------------------------------------------


def test_bars_are_tpot_and_carry_their_stall() -> None:
    rows = table(FOUR[:1])
    axes = plot_tpot_bars(rows[rows["residency"] == 0.5]).axes[0]
    tpot, miss, late = ([bar.get_width() for bar in group] for group in bars(axes))
    assert tpot == [27.0, 19.5, 17.0]
    assert miss == pytest.approx([10.0, 5.0, 10 / 3])
    assert late == pytest.approx([5.0, 2.5, 5 / 3])
    assert [bar.get_x() for bar in bars(axes)[2]] == miss
    assert [text.get_text() for text in axes.texts] == ["27.0", "19.5", "17.0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert axes.get_xlabel() == "time per output token (ms)"


def test_bars_without_stall_need_no_stall_columns() -> None:
    rows = table(FOUR[:1])[["policy", "hardware", "stack", "residency", "tpot_ms"]]
    figure = plot_tpot_bars(rows[rows["residency"] == 0.5], show_stall=False)
    assert len(figure.axes[0].containers) == 1
    assert not figure.legends


def test_a_policy_that_one_panel_lacks_leaves_a_gap_there() -> None:
    rows = table(FOUR[:2])
    rows = rows[(rows["residency"] == 0.5) & ~((rows["stack"] == "graph") & (rows["policy"] == "lru"))]
    second = plot_tpot_bars(rows).axes[1]
    places = [bar.get_y() + bar.get_height() / 2 for bar in bars(second)[0]]
    assert places == pytest.approx([0.0, 2.0])


def test_panels_may_be_residencies_and_a_floor_is_a_line_in_each() -> None:
    rows = table(FOUR[:1])
    rows["floor_ms_per_token"] = 12.0 * rows["residency"].where(rows["policy"] == "lru")
    figure = plot_tpot_bars(rows, title="Time per token", across="residency")
    assert figure.get_suptitle() == "Time per token"
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "25 % of the experts resident",
        "50 % of the experts resident",
        "100 % of the experts resident",
    ]
    # (matplotlib-stubs admit any array-like here.)
    floors: list[Any] = [axes.lines[0].get_xdata() for axes in figure.axes]
    assert [list(floor) for floor in floors] == [[3.0, 3.0], [6.0, 6.0], [12.0, 12.0]]
    assert figure.legends[0].get_texts()[-1].get_text() == "floor: no schedule is faster"


def test_every_policy_and_machine_that_is_shipped_has_a_name_of_its_own() -> None:
    for group, name in (("policy", policy_name), ("hardware", hardware_name), ("stack", stack_name)):
        names = [path.stem for path in (CONF / group).glob("*.yaml")]
        assert len({name(one) for one in names}) == len(names) > 2
        assert not any("_" in name(one) for one in names)
    assert model_name("deepseek-v2-lite_20GB") == "DeepSeek-V2-Lite in 20 GB"
    assert model_name("gpt-oss-20b-twin") == "gpt-oss-20b twin"
    assert model_name("my-own") == "my-own"


# -- refusals ------------------------------------------------------------------------------------------------


def test_two_rows_for_one_point_are_refused() -> None:
    rows = table(FOUR[:1])
    with pytest.raises(ValueError, match=r"two rows for hardware=a100, stack=eager, policy=lru, residency=0.5"):
        plot_stall_against_residency(pd.concat([rows, rows.iloc[[4]]]))
    with pytest.raises(ValueError, match=r"two rows for .* policy=on_demand; select one"):
        plot_tpot_bars(rows)
    with pytest.raises(ValueError, match=r"two rows for residency=0.25, stack=eager, policy=on_demand; select one"):
        plot_tpot_bars(table([FOUR[0], FOUR[2]]), across="residency")


def test_a_table_without_the_columns_or_without_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="the table lacks stall_ms_per_token; it has policy, hardware"):
        plot_stall_against_residency(table(FOUR).drop(columns="stall_ms_per_token"))
    with pytest.raises(ValueError, match="the table has no rows"):
        plot_tpot_bars(table(FOUR).iloc[:0])


def test_a_window_that_is_none_or_holds_nothing_is_refused(tmp_path: Path) -> None:
    shown = frames(tmp_path)
    with pytest.raises(ValueError, match=r"start_ms=2\.0 must be 0 or more and below stop_ms=1\.0"):
        plot_timeline(shown, 2.0, 1.0)
    with pytest.raises(ValueError, match=r"nothing happened between start_ms=1\.0 and stop_ms=2\.0"):
        plot_timeline(shown, 1.0, 2.0)


# -- timeline ------------------------------------------------------------------------------------------------


def spans(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    """Start and end in ns of what is drawn below S, by colour."""
    found: dict[str, list[tuple[float, float]]] = {}
    collections: list[Any] = list(figure.axes[-1].collections)
    for collection in collections:
        for path in collection.get_paths():
            times = path.vertices[:, 0]
            colour = to_hex(collection.get_facecolor()[0]).upper()
            found.setdefault(colour, []).append((round(times.min() * 1e6), round(times.max() * 1e6)))
    return found


def test_the_lanes_show_the_window_and_are_cut_at_it(tmp_path: Path) -> None:
    figure = plot_timeline(frames(tmp_path), 0.0015, 0.0042)
    assert spans(figure) == {
        "#56B4E9": [(2150, 2250), (4180, 4200)],
        "#0072B2": [(2100, 2150), (4100, 4150)],
        "#7F7F7F": [(4150, 4180)],
        "#E69F00": [(1500, 2100)],
        "#009E73": [(2100, 3100), (3100, 4100)],
        "#B2182B": [(1500, 2100)],
        "#F4A6A0": [(2250, 4100)],
    }
    axes = figure.axes[-1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["compute", "link", "stalls"]
    assert axes.get_xlabel() == "time (ms)"


def test_slices_that_are_wide_enough_name_their_expert(tmp_path: Path) -> None:
    shown = frames(tmp_path)
    names = [text.get_text() for text in plot_timeline(shown, 0.0015, 0.0042).axes[-1].texts]
    assert names == ["L0/E1", "L1/E2", "L1/E2", "L0/E1", "L1/E2"]
    assert len(plot_timeline(shown, 0.0, 10.0).axes[-1].texts) == 0


def test_s_is_a_step_line_up_to_the_end_of_the_window(tmp_path: Path) -> None:
    line = plot_timeline(frames(tmp_path), 0.0, 0.005).axes[0].lines[0]
    assert line.get_drawstyle() == "steps-post"
    assert [(round(x * 1e6), y) for x, y in points(line)] == [(100, 1), (2250, 2), (4430, 3), (5000, 3)]


def test_a_run_without_a_horizon_has_no_panel_for_it(tmp_path: Path) -> None:
    assert len(plot_timeline(frames(tmp_path, horizon=False), 0.0, 0.005).axes) == 1
    before_the_first = plot_timeline(frames(tmp_path), 0.0, 0.00009)
    assert len(before_the_first.axes) == 2
    assert len(before_the_first.axes[0].lines) == 0


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_picture_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = table(FOUR)
    for name in ("first.png", "second.png"):
        save(plot_stall_against_residency(rows, log_y=True), tmp_path / name)
    first = (tmp_path / "first.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert b"Software" not in first
    assert first == (tmp_path / "second.png").read_bytes()
    save(plot_stall_against_residency(rows), tmp_path / "second.png")
    assert first != (tmp_path / "second.png").read_bytes()


def test_the_callers_settings_are_left_alone() -> None:
    before = dict(mpl.rcParams)
    plot_stall_against_residency(table(FOUR))
    assert dict(mpl.rcParams) == before


def test_a_failed_save_leaves_no_part_of_a_file(tmp_path: Path) -> None:
    figure: Any = plot_stall_against_residency(table(FOUR))
    figure.draw = lambda renderer: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save(figure, tmp_path / "broken.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_no_text_lies_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = table(FOUR)
    title = "A title that reaches over the panels and as far as the names of the policies beside them"
    one = rows[rows["hardware"] == "a100"]
    for figure in (
        plot_stall_against_residency(rows, log_y=True, title=title),
        plot_tpot_bars(rows[rows["residency"] == 0.5], title=title),
        plot_tpot_bars(one[one["stack"] == "eager"], title=title, across="residency"),
        plot_timeline(frames(tmp_path), 0.0015, 0.0042, "two tokens"),
    ):
        assert overlapping_texts(figure, monkeypatch) == []


def test_overlapping_text_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure()
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.5, "two")
    assert overlapping_texts(figure, monkeypatch) == [("one", "two")]


def overlapping_texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Pairs of texts, of those drawn (an axis keeps ticks outside its limits, undrawn), whose boxes meet."""
    drawn: dict[int, tuple[str, Any]] = {}
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        draw(text, renderer)
        if text.get_visible() and text.get_text():
            drawn[id(text)] = (text.get_text(), text.get_window_extent(renderer))

    figure.savefig(BytesIO(), format="png")
    figure.set_layout_engine("none")  # Settled by the first drawing.
    monkeypatch.setattr(Text, "draw", noted)
    figure.savefig(BytesIO(), format="png")
    monkeypatch.undo()
    boxes = list(drawn.values())
    return [
        (name, other)
        for i, (name, box) in enumerate(boxes)
        for other, second in boxes[i + 1 :]
        if box.x0 < second.x1 and second.x0 < box.x1 and box.y0 < second.y1 and second.y0 < box.y1
    ]
