"""The commands ``up``, ``run`` and ``down``."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.testbed import probe
from deploy.testbed.federation import TABLE, Setting, Testbed, running, take_down
from deploy.testbed.links import HOST, Link, LinkError, Network, links_of
from deploy.testbed.rounds import Rounds
from fedlora_app.config.fields import Scalar, typed_value
from fedlora_app.config.keys import RunConfig
from fedlora_app.launch.processes import exit_on_signals
from fedlora_app.launch.superlink import SuperLink, SuperLinkError
from strategies.wallclock import PROFILES

PROJECT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        with exit_on_signals():
            return int(args.command(args))
    except (LinkError, SuperLinkError, OSError, ValueError) as error:
        print(f"testbed.py: {error}", file=sys.stderr)
        return 1


def up(args: argparse.Namespace) -> int:
    """Stay up until Ctrl-C, or ``down``."""
    with Testbed(_setting(args)) as bed:
        _show(bed, args.probe)
        print("up; run it with deploy/testbed.py run, end it with Ctrl-C or "
              "deploy/testbed.py down", flush=True)  # fmt: skip
        while True:
            signal.pause()


def run(args: argparse.Namespace) -> int:
    """Run the app on the testbed that is up, or on one for this run alone."""
    overrides = _overrides(args.override)
    state = running()
    if state is None:
        with Testbed(_setting(args)) as bed:
            _show(bed, args.probe)
            return _run(args, bed.link, bed.network, bed.nodes, overrides, bed.setting.shaped)
    known = [Link(**link) for link in state["links"]]
    network = Network(known, float(state["down_mbit"]))
    link = SuperLink.at(str(state["address"]), Path(str(state["home"])))
    return _run(args, link, network, state["nodes"], overrides, bool(state["shaped"]))


def down(args: argparse.Namespace) -> int:
    """Take down whatever there is; nothing is no error."""
    found = take_down()
    print(f"taken down: {', '.join(found)}" if found else "there is no testbed")
    return 0


def _run(
    args: argparse.Namespace,
    link: SuperLink,
    network: Network,
    nodes: Sequence[str],
    overrides: dict[str, Scalar],
    shaped: bool,
) -> int:
    table = link.home / TABLE
    output = Path(str(overrides.get("output") or f"runs/testbed-{time.strftime('%H-%M-%S')}"))
    config: dict[str, Scalar] = {**overrides, "output": str(output.absolute())}
    if not args.app:
        config = {"min-nodes": len(network.links), **config}
    if args.allocator != "none":
        if not shaped:
            raise LinkError("--allocator sets rates of links, and these are not shaped")
        config |= {
            "clock.allocator": "htb",
            "clock.allocate-with": str(table),
            "clock.bandwidth": args.allocator,
        }
    if shaped:
        network.reset()  # after an allocator of another run, however that ended
    number = link.run(Path(args.app or PROJECT).resolve(), config)
    print(f"run {number}: {output}", flush=True)
    rounds = Rounds(output / "metrics.jsonl", network, nodes, args.allocator)
    try:
        with rounds, _changing(args, network, nodes, table, shaped):
            for line in link.stream(number):
                print(line, flush=True)
            status = link.status(number)
    except BaseException:  # Ctrl-C as well: on what stays up it would go on
        with suppress(SuperLinkError):
            link.stop(number)
        raise
    finally:
        if shaped:
            network.reset()
    rounds.show()
    if not status.completed:
        print(f"testbed.py: run {number} is {status.status}: {status.details}", file=sys.stderr)
    return 0 if status.completed else 1


@contextmanager
def _changing(
    args: argparse.Namespace, network: Network, nodes: Sequence[str], table: Path, shaped: bool
) -> Iterator[None]:
    """Change rates after a while, if that is asked for, and back at the end of the run."""
    if not args.change_at:
        yield
        return
    if not shaped:
        raise LinkError("--change-at changes rates of links, and these are not shaped")
    over = threading.Event()
    # Every second one, say: those that change are spread over fast and slow ones.
    step = max(round(1 / args.change_share), 1)
    chosen = list(range(0, len(network.links), step))

    changed = False

    def change() -> None:
        nonlocal changed
        if over.wait(args.change_at):
            return
        changed = True
        network.change(chosen, args.change_factor)
        network.write(table, nodes)
        print(f"the rates of nodes {', '.join(map(str, chosen))} are now {args.change_factor:g} "
              "of what they were", flush=True)  # fmt: skip

    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if changed:  # for the next run
            network.change(chosen, 1 / args.change_factor)
            network.write(table, nodes)


def _overrides(pairs: Sequence[str]) -> dict[str, Scalar]:
    """Read key=value pairs as the run config does."""
    defaults, found = RunConfig().to_flat(), dict[str, Scalar]()
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"expected key=value, got {pair!r}")
        found[key] = typed_value(value, defaults.get(key))
    return found


def _setting(args: argparse.Namespace) -> Setting:
    if args.rates:
        rates = [float(rate) for rate in args.rates.split(",")]
        if any(not (math.isfinite(rate) and rate > 0) for rate in rates):
            raise LinkError(f"--rates must be numbers of Mbit/s above 0, got {args.rates!r}")
        share = 1 / args.nodes if args.shared else 1.0
        chosen = [Link(rates[i % len(rates)], share=share) for i in range(args.nodes)]
    else:
        chosen = links_of(args.profile, args.nodes, args.seed)
        if args.lines:
            chosen = [Link(link.mbit, link.speed) for link in chosen]
    return Setting(
        chosen, not args.plain, args.down, args.cores, args.poll, args.data and Path(args.data)
    )


def _show(bed: Testbed, seconds: float) -> None:
    """Print the table of links, as configured and as measured."""
    print("node                  Mbit/s  of the band  up Mbit/s  measured  cores")
    for i, (node, link) in enumerate(zip(bed.nodes, bed.network.links, strict=True)):
        found = "-"
        if seconds:
            prefix = bed.network.inside(i) if bed.setting.shaped else ()
            host = HOST if bed.setting.shaped else "127.0.0.1"
            found = f"{probe.measure(prefix, host, seconds):.3g}"
        rate = f"{link.rate:.3g}" if bed.setting.shaped else "no limit"
        cores = f"{bed.setting.cores * link.speed:.2f}" if bed.setting.cores else "1 thread"
        print(f"{node:20} {link.mbit:7.3g} {link.share:11.3g} {rate:>11} {found:>9}  {cores}",
              flush=True)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deploy/testbed.py",
        description="Real SuperNodes on this machine, each in a network namespace behind a link of "
        "its own rate. Linux, as root.",
    )
    commands = parser.add_subparsers(required=True)
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--nodes", type=int, default=4, help="how many (default: %(default)s)")
    made.add_argument(
        "--profile", choices=list(PROFILES), default="rural",
        help="what links and computers are drawn from (default: %(default)s)",
    )  # fmt: skip
    made.add_argument("--rates", metavar="MBIT,…", help="upload rates instead, in turn")
    made.add_argument(
        "--shared", action="store_true", help="--rates are those on a band that all share"
    )
    made.add_argument(
        "--lines", action="store_true", help="--profile: every node has its whole rate for itself"
    )
    made.add_argument("--seed", type=int, default=42, help="of the profile (default: %(default)s)")
    made.add_argument(
        "--down", type=float, default=100.0, metavar="MBIT",
        help="what each node downloads with (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--cores", type=float, default=0.0,
        help="what the fastest node may use of the machine's cores; others by the profile "
        "(default: no limit, but one thread)",
    )  # fmt: skip
    made.add_argument(
        "--poll", type=float, default=0.5, metavar="SECONDS",
        help="pause between two looks of a SuperNode for messages (default: %(default)s)",
    )  # fmt: skip
    made.add_argument("--data", metavar="DIR", help="csv files, one a node (default: data.name)")
    made.add_argument(
        "--probe", type=float, default=1.0, metavar="SECONDS",
        help="how long to measure each link; 0: not at all (default: %(default)s)",
    )  # fmt: skip
    made.add_argument(
        "--plain", action="store_true", help="on loopback, without shaping; needs no root"
    )
    commands.add_parser("up", parents=[made], help="make it, and stay").set_defaults(command=up)
    running_ = commands.add_parser(
        "run", parents=[made], help="run the app on what is up, or on one for this run alone"
    )
    running_.set_defaults(command=run)
    running_.add_argument(
        "--allocator", choices=("none", "equal", "optimal"), default="none",
        help="set each round's shares of the band (default: %(default)s)",
    )  # fmt: skip
    running_.add_argument(
        "--change-at", type=float, default=0.0, metavar="SECONDS",
        help="then rates fall (default: never)",
    )  # fmt: skip
    running_.add_argument("--change-share", type=float, default=0.5, help="of so many nodes")
    running_.add_argument("--change-factor", type=float, default=0.1, help="to so much")
    running_.add_argument("--app", metavar="DIR", help="another Flower app than this project's")
    running_.add_argument("override", nargs="*", metavar="key=value", help="of the run config")
    ended = commands.add_parser("down", help="take down whatever there is")
    ended.set_defaults(command=down)
    return parser
