"""How cost grows: environment steps per second over the number of environments, with 1 and 2 workers, as a picture.

    python benchmarks/scaling.py             # about four minutes; medians of three rounds, into assets/scaling.svg

Everything is checked; actions are drawn beforehand; the dashed line is a bare loop over one environment.
"""

import argparse
import functools
import statistics
import sys
from pathlib import Path

from transport import CASES, bare, bridge, steps_per_second

SIZES = (1, 2, 4, 8, 16, 32, 64)
COLOURS = {1: "#00798c", 2: "#d1495b"}
WIDTH, HEIGHT, LEFT, TOP, APART = 300, 240, 70, 40, 400  # of one panel, in the picture's units


def panel(title: str, limit: float, speeds: dict[int, dict[int, float]], left: int) -> list[str]:
    """One diagram as SVG: N on a logarithmic axis, steps per second on a linear one."""
    top = max([limit, *(speed for line in speeds.values() for speed in line.values())])
    tick = next(step for step in (500, 1000, 2000, 5000, 10_000, 20_000, 50_000) if top / step <= 6)
    highest = tick * (int(top / tick) + 1)

    def x(num_envs: int) -> float:
        return left + WIDTH * SIZES.index(num_envs) / (len(SIZES) - 1)

    def y(speed: float) -> float:
        return TOP + HEIGHT * (1 - speed / highest)

    right = left + WIDTH
    parts = [f'<text x="{left}" y="{TOP - 16}" font-weight="bold">{title}</text>']
    for speed in range(0, highest + 1, tick):
        parts.append(f'<path d="M{left} {y(speed):.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y(speed) + 4:.1f}" text-anchor="end">{speed:,}</text>')
    for num_envs in SIZES:
        parts.append(f'<text x="{x(num_envs):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{num_envs}</text>')
    parts.append(f'<path d="M{left} {y(limit):.1f}H{right}" stroke="#444" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{left}" y="{y(limit) - 5:.1f}">bare loop</text>')
    for workers, line in speeds.items():
        points = " ".join(f"{x(num_envs):.1f},{y(speed):.1f}" for num_envs, speed in line.items())
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[workers]}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(num_envs):.1f}" cy="{y(speed):.1f}" r="3" fill="{COLOURS[workers]}"/>'
            for num_envs, speed in line.items()
        ]
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    parts = []
    for number, case in enumerate(("CartPole, N=8", "Pong RAM, N=8")):
        env_id, kwargs, contract, _ = CASES[case]
        readings: dict[tuple[int, int], list[float]] = {}
        for _ in range(args.rounds):
            for workers in 0, 1, 2:  # 0: the bare loop
                for size in SIZES if workers else (1,):
                    if workers <= size:
                        peer = functools.partial(bridge, workers) if workers else bare
                        speed = steps_per_second(peer, (env_id, kwargs, contract, size))
                        readings.setdefault((workers, size), []).append(speed)
        medians = {key: statistics.median(values) for key, values in readings.items()}
        print(f"\n| {env_id} | {' | '.join(f'N={size}' for size in SIZES)} |")
        print("|---|" + "---:|" * len(SIZES))
        for workers in 1, 2:
            cells = [f"{medians[workers, size]:,.0f}" if workers <= size else "-" for size in SIZES]
            print(f"| {workers} worker{'s' * (workers > 1)} | {' | '.join(cells)} |")
        print(f"(a bare loop: {medians[0, 1]:,.0f} steps a second)", flush=True)
        speeds = {w: {size: medians[w, size] for size in SIZES if w <= size} for w in (1, 2)}
        parts += panel(f"{env_id}: steps per second", medians[0, 1], speeds, LEFT + APART * number)
    below = TOP + HEIGHT + 44
    for workers, left in (1, LEFT), (2, LEFT + 110):
        parts.append(f'<circle cx="{left + 5}" cy="{below - 4}" r="4" fill="{COLOURS[workers]}"/>')
        parts.append(f'<text x="{left + 15}" y="{below}">{workers} worker{"s" * (workers > 1)}</text>')
    parts.append(f'<text x="{LEFT + APART + WIDTH}" y="{below}" text-anchor="end">N, environments</text>')
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 340" font-family="sans-serif" font-size="12">'
    white = '<rect width="790" height="340" fill="white"/>'
    picture = Path(__file__).resolve().parents[1] / "assets/scaling.svg"
    picture.write_text("\n".join([svg, white, *parts, "</svg>\n"]))
    print(f"see {picture}", file=sys.stderr)


if __name__ == "__main__":
    main()
