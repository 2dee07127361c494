"""What a run of bench/gpu.py says: README's table, and which of the bars it met. No torch."""

from __future__ import annotations

from typing import Any

Result = dict[str, Any]


def results(document: dict[str, Any], part: str) -> list[Result]:
    """What a part found out; failed measurements are left out."""
    found = next((p["results"] for p in document["parts"] if p["name"] == part), [])
    return [result for result in found if "failed" not in result]


def best(found: list[Result], key: str, **wanted: Any) -> Result | None:
    """The result with the largest `key` among those with the wanted fields; None if there is none."""
    fit = [r for r in found if r.get(key) is not None and all(r.get(name) == value for name, value in wanted.items())]
    return max(fit, key=lambda r: r[key], default=None)


def published(document: dict[str, Any]) -> Result | None:
    """The published loop on the same batch."""
    return best(results(document, "published"), "images_per_second", peer="LlamaGen", images=256)


def bars(document: dict[str, Any]) -> list[Result]:
    """The bars of one H100 or H200: what was wanted, what was found, whether it was met (None: not measured).

    A dry run has none.
    """
    if document.get("dry"):
        return []
    batch, latency = results(document, "batch"), results(document, "latency")
    sixth = [r for r in batch if r.get("plan") == "line 4/24"] or [r for r in batch if "line" in r.get("plan", "")]
    told: list[Result] = []

    def bar(name: str, wanted: float, found: float | None, most: bool = False) -> None:
        met = None if found is None else found <= wanted if most else found >= wanted
        told.append({"bar": name, "wanted": wanted, "found": found, "met": met})

    tests = results(document, "correctness")
    bar("GPU tests that failed, at most", 0, tests[-1]["failed_tests"] if tests else None, most=True)
    whole, part = best(sixth, "whole_images_per_second"), best(sixth, "images_per_second")
    fast = whole["whole_images_per_second"] if whole else part and part["images_per_second"]
    bar("LlamaGen-XL, 256 images, 4 of 24 lines: images per second", 40, fast)
    theirs = published(document)
    times = fast / theirs["images_per_second"] if fast and theirs else None
    bar("the same: times the published loop", 10, times)
    share = best(sixth, "of_copy_bandwidth")
    bar("the same: share of the measured copy bandwidth", 0.5, share and share["of_copy_bandwidth"])
    for name in sorted({r["model"] for r in latency if "model" in r}):
        one = best(latency, "of_weight_bound", model=name, images=1, step="graph")
        bar(f"{name}, one image, graphs: share of the weight-bandwidth bound", 0.6, one and one["of_weight_bound"])
    few = [r for r in results(document, "weights") if r.get("images") == 1 and r.get("model") == "LlamaGen-XL"]
    whole = best(few, "images_per_second", weights="default")
    for kind, wanted in (("int8", 1.6), ("int4", 2.2)) if few else ():
        one = best(few, "images_per_second", weights=kind)
        gain = one["images_per_second"] / whole["images_per_second"] if one and whole else None
        bar(f"LlamaGen-XL, one image, {kind} weights: times bfloat16", wanted, gain)
    ends = [r["line_end_share"] for r in sixth if r.get("step") == "graph" and r.get("line_end_share") is not None]
    bar("a line's end, share of a line, at most", 0.05, min(ends, default=None), most=True)
    over = [abs(r["peak_over_plan"] - 1) for r in batch if r.get("peak_over_plan") is not None]
    bar("peak memory off the plan, at most", 0.03, max(over, default=None), most=True)
    return told


def table(document: dict[str, Any]) -> str:
    """Markdown for README: one batch of 256, one image, and the bars."""
    about = document["circumstances"]
    lines = []
    if document.get("dry"):
        lines += ["A dry run on the CPU, in tiny sizes: none of these numbers says anything.", ""]
    where = ", ".join(
        f"{label}{about[key]}" for key, label in (("device", ""), ("torch", "torch "), ("commit", "")) if key in about
    )
    lines += [f"Random weights in bfloat16, with guidance; {where or 'an unknown device'}.", ""]
    lines += ["| model | images | cache | step | ms a token | images per second | peak, GB | × published |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    theirs = published(document)
    for part in ("batch", "latency"):
        for r in results(document, part):
            if r.get("images_per_second") is None or r.get("what") != "drawing":
                continue
            beside = r["images_per_second"] / theirs["images_per_second"] if theirs and part == "batch" else None
            how = r["step"] + (", kernel" if r["attention"] == "kernel" else "")
            numbers = (r["step_ms"]["median"], ".2f"), (r["images_per_second"], ".2f"), (r.get("peak_gb"), ".1f")
            shown = [_number(*number) for number in (*numbers, (beside, ".1f"))]
            lines.append(f"| {r['model']} | {r['images']} | {r['plan']} | {how} | {' | '.join(shown)} |")
    told = bars(document)
    lines += ["", "| bar | wanted | found | met |", "|---|---|---|---|"] if told else []
    for one in told:
        met = {None: "not measured", True: "yes", False: "no"}[one["met"]]
        lines.append(f"| {one['bar']} | {one['wanted']} | {_number(one['found'], '.3g')} | {met} |")
    unfinished = [f"{p['name']} ({p['state']})" for p in document["parts"] if p["state"] != "done"]
    if unfinished:
        lines += ["", f"Not complete: {', '.join(unfinished)}."]
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
