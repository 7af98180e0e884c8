#!/usr/bin/env python3
"""Draws the plots of docs/design/sharing.md: python3 bench/gpu/plot_sharing.py [FOLDER]

The numbers were read on an H100 80GB HBM3 with driver 580.159.04 on 2026-11-22. New ones: change the tables, draw again.
"""
import math
import pathlib
import sys

# Slice in ms -> steps per second of two equal busy tenants in sum.
GEMM_ALONE, GPT_ALONE = 622.0, 36.33
SLICES = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40]
GEMM = [30.66, 250.64, 457.3, 521.97, 557.92, 584.61, 605.95, 609.28, 613.95]
GPT = [4.0, 17.0, 29.0, 34.0, 38.0, 40.0, 41.5, 40.5, 41.5]
SWITCH = 0.2               # the policy's model: slice / (slice + switch)
INSIDE, OUTSIDE = 0.09, 0.08  # the fit in two parts: (slice - inside) / (slice + outside)

# Name, p99 of the interactive tenant in ms, training steps per second in sum, p99 alone in the same run.
P99 = [
    ("1 trainer, nothing done", 2.92, "32.3", 0.74),
    ("1 trainer, slice 1 ms", 1.85, "32.3", 0.74),
    ("1 trainer, slice 200 us", 1.46, "34.8", 1.10),
    ("1 trainer, slice 100 us", 1.36, "29.5", 1.10),
    ("1 trainer, slice 50 us", 1.31, "34.5", 1.10),
    ("3 trainers, nothing done", 7.67, "35.3", 0.74),
    ("3 trainers, slices 2 ms", 8.26, "35.5", 0.74),
    ("3 trainers, slices 1 ms", 5.58, "32.0", 0.74),
    ("3 trainers, slices 500 us", 3.61, "26.3", 0.74),
    ("3 trainers, slices 200 us", 4.05, "16.3", 0.74),
    ("3 trainers, slices 50 us", 1.88, "0: starved", 0.74),
    ("3 trainers in turns of 20 ms, slice 50 us", 1.49, "36.0", 1.10),
]

INK, FAINT, A, B, C = "#333", "#ccc", "#1f6fb4", "#c2571a", "#555"


class Page:
    def __init__(self, width, height, title):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img" font-family="sans-serif" font-size="13"><title>{title}</title>',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="16" y="24" font-size="15" fill="{INK}">{title}</text>',
        ]

    def line(self, x1, y1, x2, y2, colour=FAINT, dash=""):
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{extra}/>')

    def path(self, points, colour, dash=""):
        text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<polyline points="{text}" fill="none" stroke="{colour}" stroke-width="2"{extra}/>')

    def dot(self, x, y, colour):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')

    def bar(self, x, y, width, height, colour):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>')

    def text(self, x, y, words, anchor="start", colour=INK):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{words}</text>')

    def write(self, path):
        path.write_text("\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


def slices(path):
    page = Page(760, 440, "Two busy tenants: throughput in sum, part of one alone")
    left, right, top, bottom, most = 60, 740, 50, 380, 1.2
    x = lambda ms: left + (right - left) * (math.log10(ms) + 1.1) / 2.9
    y = lambda part: bottom - (bottom - top) * part / most
    for part in (0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2):
        page.line(left, y(part), right, y(part))
        page.text(left - 8, y(part) + 4, f"{100 * part:.0f} %", "end")
    for ms in SLICES:
        page.line(x(ms), bottom, x(ms), bottom + 5, INK)
        page.text(x(ms), bottom + 20, f"{ms:g}", "middle")
    page.text((left + right) / 2, bottom + 42, "slice of each, ms", "middle")
    fine = [10 ** (-1.04 + 0.02 * i) for i in range(134)]
    page.path([(x(s), y(s / (s + SWITCH))) for s in fine], C, "6 4")
    page.path([(x(s), y(max(0, s - INSIDE) / (s + OUTSIDE))) for s in fine], C)
    for values, alone, colour in ((GEMM, GEMM_ALONE, A), (GPT, GPT_ALONE, B)):
        for s, value in zip(SLICES, values):
            page.dot(x(s), y(value / alone), colour)
    for i, (words, colour) in enumerate((
            ("dots: gemm, measured", A), ("dots: gpt, measured (fills the gaps of the other's CPU work)", B),
            ("dashed: the policy's model, 0.2 ms a switch", C),
            ("line: 0.09 ms of a switch inside the slice, 0.08 ms after it", C))):
        page.text(340, 270 + 20 * i, words, "start", colour)
    page.write(path)


def p99(path):
    page = Page(760, 70 + 28 * len(P99) + 20, "p99 of an interactive tenant (ms), and what is left of the training (steps/s)")
    left, scale = 300, 34.0
    for i, (name, value, rate, alone) in enumerate(P99):
        y = 48 + 28 * i
        page.text(left - 8, y + 14, name, "end")
        page.bar(left, y, value * scale, 18, B if "nothing" in name or "starved" in rate else A)
        page.line(left + alone * scale, y - 3, left + alone * scale, y + 21, INK)
        page.text(left + value * scale + 8, y + 14, f"{value:.2f} ms; {rate}" + ("" if "starved" in rate else "/s"))
    page.text(16, 48 + 28 * len(P99) + 20, "black mark: the same tenant alone in the same run. Training alone: 36.3 steps/s.")
    page.write(path)


def main():
    here = pathlib.Path(__file__).resolve().parents[2]
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else here / "docs/design"
    slices(folder / "sharing-slices.svg")
    p99(folder / "sharing-p99.svg")


if __name__ == "__main__":
    main()
