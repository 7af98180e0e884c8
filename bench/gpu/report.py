"""From results to a page that can be appended to bench/RESULTS.md, and two plots (SVG by hand: nothing to install)."""
import json
import os
from xml.sax.saxutils import escape

MIB = 1 << 20


def write(results, folder):
    with open(os.path.join(folder, "results.json"), "w") as out:
        json.dump(results, out, indent=1)
        out.write("\n")
    for name, text in (
        ("RESULTS.part.md", page(results)),
        ("shares.svg", shares_plot(results)),
        ("interactive.svg", latency_plot(results)),
    ):
        with open(os.path.join(folder, name), "w") as out:
            out.write(text)


def scene(results, name):
    return results["scenes"].get(name) or {}


def all_errors(data):
    return [e for row in data.get("rows", []) for e in row["errors"]]


def find(rows, **wanted):
    return next((r for r in rows if all(r.get(k) == v for k, v in wanted.items())), None)


# ---- the table of the goal: figure, goal, measured, verdict
def judged(results):
    rows = []

    def row(figure, goal, measured, good):
        rows.append((figure, goal, measured, "-" if good is None else "met" if good else "MISSED"))

    data = scene(results, "shares")
    errors = all_errors(data)
    if errors:
        mean, worst = sum(errors) / len(errors), max(errors)
        row(
            "share error, two to four busy tenants",
            "mean <= 1 point, worst <= 2",
            f"mean {mean:.2f}, worst {worst:.2f} ({len(data['rows'])} windows)",
            mean <= 1 and worst <= 2,
        )
        for kind in dict.fromkeys(r["kind"] for r in data["rows"]):
            mine = [e for r in data["rows"] if r["kind"] == kind for e in r["errors"]]
            row(f"&nbsp; {kind}", "", f"mean {sum(mine) / len(mine):.2f}, worst {max(mine):.2f}", None)
        sums = [100 * r["sum"] for r in data["rows"]]
        row(
            "throughput of all tenants against exclusive",
            ">= 97 %",
            f"mean {sum(sums) / len(sums):.1f} %, worst {min(sums):.1f} %",
            min(sums) >= 97,
        )
        idle = [100 * r["ratio"] for r in data["idle"]]
        if idle:
            row(
                "the same with one idle tenant",
                ">= 99 %",
                f"mean {sum(idle) / len(idle):.1f} %, worst {min(idle):.1f} %",
                min(idle) >= 99,
            )
    rows_of = scene(results, "interactive").get("rows", [])
    alone = find(rows_of, scheme="native", beside="alone")
    for beside, limit, least in (("one trainer", 1.15, 0.95), ("three trainers", 1.5, 0.85)):
        ours, theirs = find(rows_of, scheme="bulkhead", beside=beside), find(rows_of, scheme="native", beside=beside)
        if alone and ours and alone["p99"] and ours["p99"]:
            ratio, kept = ours["p99"] / alone["p99"], ours.get("kept")
            unmanaged = f"; unmanaged {theirs['p99'] / alone['p99']:.1f}x" if theirs and theirs["p99"] else ""
            row(
                f"interactive p99 beside {beside}, against alone",
                f"<= {limit}x; best effort keeps >= {least:.0%} of what is left over",
                f"{ratio:.2f}x ({ours['p99']:.2f} ms of {alone['p99']:.2f}){unmanaged}; kept {'?' if kept is None else f'{kept:.0%}'}",
                ratio <= limit and (kept or 0) >= least,
            )
    limits = [r for r in scene(results, "ceilings").get("rows", []) if r["ceiling"] and r["kind"] == "spin"]
    if limits:
        row(
            "hard ceiling on an idle GPU, error (time)",
            "stated",
            f"worst {max(abs(r['error']) for r in limits):.1f} points "
            f"({', '.join(str(r['ceiling']) for r in limits)} % asked)",
            None,
        )
    calls = {r["variant"]: r for r in scene(results, "costs").get("rows", [])}
    if "native" in calls:
        base = calls["native"]
        for name, goal, most in (("held", "0 from outside", 0.5), ("guard", "<= 1 % of launch rate", 1.0)):
            if name in calls:
                more = 100 * (calls[name]["launch_ns"] / base["launch_ns"] - 1)
                row(
                    f"added cost of a launch, {name}",
                    goal,
                    f"{more:+.1f} % ({calls[name]['launch_ns']:.0f} ns, native {base['launch_ns']:.0f})",
                    more <= most,
                )
        for name in ("held, capped", "guard"):
            if name in calls:
                more = calls[name]["alloc_free_ns"] - base["alloc_free_ns"]
                row(
                    f"added cost of alloc+free of 1 MiB, {name}",
                    "<= 300 ns",
                    f"{more:+.0f} ns (native {base['alloc_free_ns']:.0f})",
                    more <= 300,
                )
    data = scene(results, "memory")
    if "held" in data:
        past = max((r["past"] for r in data["held"]["rows"]), default=0)
        total = max((r["gpu_past"] for r in data["held"]["rows"]), default=0)
        broken = [r["path"] for r in data["held"]["rows"] if r.get("broken")]
        who = [r["path"] for r in data["held"]["rows"] if r["past"]]
        row(
            "bytes past the cap, adversarial suite",
            "0",
            f"{past / MIB:.0f} MiB over {len(data['held']['rows'])} paths"
            + (f" ({', '.join(who)})" if who else "")
            + (f"; broke: {', '.join(broken)}" if broken else ""),
            past == 0 and not broken,
        )
        who = [r["path"] for r in data["held"]["rows"] if r["gpu_past"]]
        row(
            "the same on the GPU's total (managed memory and orphans are in nobody's bytes)",
            "0",
            f"{total / MIB:.0f} MiB" + (f" ({', '.join(who)})" if who else ""),
            total == 0,
        )
        for one in data.get("usable", [])[:2]:
            row(f"usable part of the cap ({one['path']})", ">= 98 %", f"{100 * one['part']:.1f} %", one["part"] >= 0.98)
    data = scene(results, "start")
    times = [r["in_force_us"] for r in data.get("in_force", []) if r["in_force_us"]]
    if times:
        row(
            "from a program's first channel group to its share in force",
            "<= 50 ms",
            f"worst {max(times) / 1e3:.1f} ms",
            max(times) <= 50000,
        )
    many = data.get("many", [])
    for ours in (r for r in many if r["scheme"] == "bulkhead"):
        theirs = find(many, scheme="native", what=ours["what"])
        if theirs:
            more = ours["seconds"] - theirs["seconds"]
            row(
                f"{ours['what']}, starting at once",
                "<= 1 s added",
                f"{ours['seconds']:.2f} s, native {theirs['seconds']:.2f}; {ours['failed']} failed",
                more <= 1 and not ours["failed"],
            )
    kills = scene(results, "faults").get("kills", [])
    calls = [r["longest_call_ms"] for r in kills if r["killed"] == "arbiter of alloc"]
    if calls:
        row(
            "SIGKILL of an arbiter: longest call of its tenant",
            "recovered <= 10 ms",
            f"worst {max(calls):.1f} ms",
            max(calls) <= 10,
        )
    for one in scene(results, "faults").get("neighbours", []):
        if "neighbours" in one:
            usual = one.get("least_of_usual")
            row(
                f"neighbours of a tenant: {one['villain']}",
                "within 3 % of share",
                f"at least {100 * one['least_of_share']:.1f} % of their share"
                + (f", {100 * usual:.1f} % of what a well-behaved one leaves them" if usual else ""),
                max(one["least_of_share"], usual or 0) >= 0.97,
            )
        else:
            row(f"neighbours of a tenant: {one['villain']}", "within 3 % of share", one["failed"][:120], False)
    return rows


def table(header, rows):
    return (
        "\n".join(
            ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
            + ["| " + " | ".join(str(c).replace("|", "/").replace("\n", " ") for c in row) + " |" for row in rows]
        )
        + "\n"
    )


def number(value, digits=2):
    return "-" if value is None else f"{value:.{digits}f}"


def page(results):
    parts = [
        f"## Software slices, {results['when']}: {results['gpu']}, driver {results['driver']}\n",
        "`./do bench-gpu"
        + (" --quick" if results["quick"] else "")
        + "`. A tenant's received share is its rate divided by its rate alone on the GPU, "
        "normalised over the tenants of the window.\n",
    ]
    if results["dry"]:
        parts.insert(0, "**Dry run: CPU stand-ins, no figure means anything.**\n")
    parts.append(table(("figure", "goal", "measured", ""), judged(results)))
    data = scene(results, "shares")
    if data.get("rows"):
        parts += [
            "### Shares\n",
            table(
                ("tenants", "asked %", "received %", "worst error", "sum of exclusive"),
                [
                    (
                        r["kind"],
                        " / ".join(f"{a:g}" for a in r["asked"]),
                        " / ".join(f"{x:.1f}" for x in r["received"]),
                        f"{max(r['errors']):.2f}",
                        f"{100 * r['sum']:.1f} %",
                    )
                    for r in data["rows"]
                ],
            ),
        ]
        parts.append(
            table(
                ("one busy tenant, one idle", "alone a second", "of it held", "drift of alone"),
                [
                    (r["kind"], f"{r['exclusive']:.1f}", f"{100 * r['ratio']:.1f} %", f"{100 * r['drift']:.1f} %")
                    for r in data["idle"]
                ],
            )
        )
    latency = scene(results, "interactive").get("rows", [])
    if latency:
        parts += [
            "### An interactive tenant: ResNet-50 fp16 batch 4, 100 requests a second, open loop\n",
            latency_table(latency),
        ]
    data = scene(results, "peers")
    if data.get("shares") or data.get("unavailable"):
        parts.append("### The peers, same run, same programs\n")
        schemes = list(dict.fromkeys([r["scheme"] for r in data["shares"]] + list(data["unavailable"])))
        lines = []
        for name in schemes:
            line = [name]
            for kind in ("gemm", "train"):
                row = find(data["shares"], scheme=name, kind=kind)
                line.append(
                    f"{row['received'][0]:.1f} : {row['received'][1]:.1f} ({100 * row['sum']:.0f} %)" if row else "-"
                )
            row = find(data["latency"], scheme=name, beside="one trainer")
            line.append(
                f"{number(row['p99'])} ({number(row.get('best_effort'), 1)}/s, kept {row['kept']:.0%})"
                if row and row.get("kept") is not None
                else "-"
            )
            line.append(data["unavailable"].get(name, data["notes"].get(name, ""))[:160])
            lines.append(line)
        parts.append(
            table(
                (
                    "scheme",
                    "gemm 25 : 75 (sum of exclusive)",
                    "training 30 : 70",
                    "interactive p99 ms beside training",
                    "note",
                ),
                lines,
            )
        )
    data = scene(results, "ceilings").get("rows", [])
    if data:
        parts += [
            "### Ceilings on an idle GPU (spin: time; the others do more than their time, since a rested GPU clocks higher)\n",
            table(
                ("tenant", "ceiling", "of its work alone"),
                [
                    (r["kind"], "none" if r["ceiling"] is None else f"{r['ceiling']} %", f"{r['received']:.1f} %")
                    for r in data
                ],
            ),
        ]
    data = scene(results, "costs").get("rows", [])
    if data:
        parts += [
            "### Calls\n",
            table(
                ("", "launch ns", "alloc+free 1 MiB us", "memory query us", "context ms"),
                [
                    (
                        r["variant"],
                        f"{r['launch_ns']:.0f}",
                        f"{r['alloc_free_ns'] / 1e3:.1f}",
                        f"{r['memory_query_ns'] / 1e3:.2f}",
                        f"{r['context_ms']:.0f}",
                    )
                    for r in data
                ],
            ),
        ]
    data = scene(results, "memory")
    if "held" in data:
        native = {r["path"]: r for r in data.get("native", {}).get("rows", [])}
        mib = lambda r, key: "-" if not r else f"{r[key] / MIB:.0f}"
        parts += [
            f"### Past a cap of {data['cap'] / MIB:.0f} MiB (NVML sampled every 5 ms, {data['held']['samples']} samples)\n",
            table(
                (
                    "path",
                    "peak of its processes, MiB",
                    "peak of the GPU",
                    "past the cap",
                    "what the program saw",
                    "without a cap",
                ),
                [
                    (
                        r["path"],
                        mib(r, "peak"),
                        mib(r, "gpu"),
                        f"{max(r['past'], r['gpu_past']) / MIB:.0f}",
                        r["refusal"] + (f"; {r['note']}" if r["note"] else ""),
                        mib(native.get(r["path"]), "gpu"),
                    )
                    for r in data["held"]["rows"]
                ],
            ),
        ]
    data = scene(results, "start")
    if data.get("in_force"):
        parts += [
            "### Starting\n",
            table(
                ("in force, ms (bulkhead)", "share seen from outside, ms after first work"),
                [(number(r["in_force_us"] and r["in_force_us"] / 1e3), r["seen_within_ms"]) for r in data["in_force"]],
            ),
        ]
    data = scene(results, "faults")
    if data.get("kills"):
        parts += [
            "### Killed\n",
            table(
                ("what", "another after ms", "longest call ms", "share before", "after", "rate"),
                [
                    (
                        r["killed"],
                        number(r.get("respawned_ms")),
                        number(r.get("longest_call_ms", r.get("longest_gap_ms"))),
                        number(r.get("share_before"), 1),
                        number(r.get("share_after"), 1),
                        f"{100 * r.get('sum_ratio', r.get('rate_of_alone', 0)):.1f} %",
                    )
                    for r in data["kills"]
                ],
            ),
        ]
    trouble = [
        (n, d["status"], d.get("reason", "")[:300]) for n, d in results["scenes"].items() if d.get("status") != "ok"
    ]
    if trouble:
        parts += ["### Not measured, or in part\n", table(("scene", "", "why"), trouble)]
    return "\n".join(parts)


def latency_table(rows):
    return table(
        ("scheme", "beside", "requests", "p50 ms", "p90", "p99", "max", "best effort /s", "of what is left over"),
        [
            (
                r["scheme"],
                r["beside"],
                r["requests"],
                number(r["p50"]),
                number(r["p90"]),
                number(r["p99"]),
                number(r["max"]),
                number(r.get("best_effort"), 1),
                f"{r['kept']:.0%}" if r.get("kept") is not None else "-",
            )
            for r in rows
        ],
    )


# ---- plots
INK, FAINT, PAPER = "#24292f", "#d0d7de", "#ffffff"
COLOURS = {"gemm": "#0969da", "train": "#bf3989", "small": "#1a7f37", "graph": "#bc4c00", "coop": "#8250df"}


class Drawing:
    def __init__(self, width, height, title):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            f'font-family="system-ui, sans-serif" font-size="12" role="img">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="{PAPER}"/>',
        ]
        self.text(16, 24, title, size=15, weight="600")

    def line(self, x1, y1, x2, y2, colour=FAINT, width=1.0, dash=""):
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"{dashed}/>'
        )

    def text(self, x, y, text, anchor="start", size=12, colour=INK, weight="400"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" font-weight="{weight}">{escape(str(text))}</text>'
        )

    def dot(self, x, y, colour, hollow=False):
        fill = (
            f'fill="{PAPER}" stroke="{colour}" stroke-width="1.6"' if hollow else f'fill="{colour}" fill-opacity="0.75"'
        )
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" {fill}/>')

    def bar(self, x, y, width, height, colour):
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{colour}" rx="2"/>'
        )

    def end(self):
        return "\n".join(self.parts + ["</svg>"]) + "\n"


def shares_plot(results):
    rows, others = scene(results, "shares").get("rows", []), [
        r for r in scene(results, "peers").get("shares", []) if r["scheme"] != "bulkhead"
    ]
    out = Drawing(760, 500, "Share of the GPU: asked against received, %")
    left, top, size = 60, 50, 400
    place = lambda asked, got: (left + asked / 100 * size, top + size - got / 100 * size)
    for tick in range(0, 101, 10):
        x, y = place(tick, tick)
        out.line(left, y, left + size, y)
        out.line(x, top, x, top + size)
        out.text(left - 8, y + 4, tick, "end", colour=INK)
        out.text(x, top + size + 18, tick, "middle")
    out.line(*place(0, 0), *place(100, 100), colour=INK, width=1, dash="4 3")
    out.text(left + size / 2, top + size + 38, "asked", "middle")
    for row in others:
        for asked, got in zip(row["asked"], row["received"]):
            out.dot(*place(asked, got), "#6e7781", hollow=True)
    for row in rows:
        for asked, got in zip(row["asked"], row["received"]):
            out.dot(*place(asked, got), COLOURS.get(row["kind"], INK))
    x, y = left + size + 30, top + 10
    for kind in dict.fromkeys(r["kind"] for r in rows):
        mine = [e for r in rows if r["kind"] == kind for e in r["errors"]]
        out.dot(x, y, COLOURS.get(kind, INK))
        out.text(x + 12, y + 4, f"{kind}: mean {sum(mine) / len(mine):.2f}, worst {max(mine):.2f}")
        y += 22
    for name in dict.fromkeys(r["scheme"] for r in others):
        mine = [e for r in others if r["scheme"] == name for e in r["errors"]]
        out.dot(x, y, "#6e7781", hollow=True)
        out.text(x + 12, y + 4, f"{name}: mean {sum(mine) / len(mine):.1f}, worst {max(mine):.1f}")
        y += 22
    return out.end()


def latency_plot(results):
    """p99 by scheme, on a logarithmic scale: some are thousands of times alone."""
    from math import log10

    bars, seen = [], set()
    for row in scene(results, "interactive").get("rows", []):
        if row["p99"] and row["beside"] != "alone, after":
            bars.append(
                (
                    f"{'bulkhead' if row['scheme'] == 'bulkhead' else 'unmanaged'}, {row['beside']}",
                    row["p99"],
                    row["scheme"] == "bulkhead",
                )
            )
            seen.add(row["scheme"])
    for row in scene(results, "peers").get("latency", []):
        if row["p99"] and row["beside"] == "one trainer" and row["scheme"] not in seen:
            bars.append((f"{row['scheme']}, one trainer", row["p99"], False))
    height = 90 + 26 * max(1, len(bars))
    out = Drawing(760, height, "Interactive tenant's p99, ms (logarithmic)")
    if not bars:
        out.text(16, 60, "not measured")
        return out.end()
    left, right, top = 230, 680, 46
    low = min(0.5, min(b[1] for b in bars))
    high = max(10.0, max(b[1] for b in bars))
    at = lambda value: left + (log10(value) - log10(low)) / (log10(high) - log10(low)) * (right - left)
    decade = 0.5
    ticks = []
    while decade <= high * 1.01:
        if decade >= low:
            ticks.append(decade)
        decade *= 2 if str(f"{decade:e}")[0] in "15" else 2.5
    for tick in ticks:
        out.line(at(tick), top - 6, at(tick), height - 30)
        if len(ticks) < 12 or f"{tick:e}"[0] == "1":
            out.text(at(tick), height - 14, f"{tick:g}", "middle")
    for k, (name, value, ours) in enumerate(bars):
        y = top + 26 * k
        out.text(left - 10, y + 14, name, "end")
        out.bar(left, y + 2, at(value) - left, 16, "#0969da" if ours else "#8c959f")
        out.text(at(value) + 6, y + 14, f"{value:.2f}")
    return out.end()
