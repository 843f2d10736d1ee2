"""The ``peft-kernels`` command: ``doctor``, ``verify``, ``bench``, ``report`` and ``tune``.

Each command's module is imported when it is asked for, so that no command needs what another needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

import peft_kernels
from peft_kernels._library import HAS_TRITON
from peft_kernels.tools import UserError
from peft_kernels.tools.printing import console_for


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 1 where ``verify`` finds something wrong, or ``report`` a kernel outside
        its budget; 2 after a mistake of the caller's, which is told in one line.
    """
    args = _parser().parse_args(argv)
    try:
        return args.run(args, console_for(stderr=args.json))
    except UserError as error:
        print(f"peft-kernels {args.command}: {error}", file=sys.stderr)
        return 2


def _doctor(args: argparse.Namespace, console: Console) -> int:
    from peft_kernels.tools import doctor

    if args.json:
        _print_json(doctor.facts())
    else:
        doctor.doctor(console)
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    from peft_kernels.tools.verify.run import print_verified, verify

    found = verify(
        console,
        device=args.device,
        ops=args.op,
        dtypes=args.dtype,
        seed=args.seed,
        jobs=args.jobs,
    )
    if args.json:
        _print_json(found.to_document())
    else:
        print_verified(console, found)
    return 1 if found.bad() else 0


def _bench(args: argparse.Namespace, console: Console) -> int:
    from peft_kernels.tools.bench.run import Request, bench, to_document

    if args.all and (args.shapes or args.dtype or args.backward):
        raise UserError("--all measures every case; it takes no --shapes, --dtype or --backward")
    request = Request(
        op=args.op,
        shapes=args.shapes,
        dtype=args.dtype or torch.float32,
        backward=args.backward,
        everything=args.all,
        compiled=args.compile,
        device=args.device,
        rounds=args.rounds,
        seconds=args.seconds,
        out=args.out,
        markdown=args.markdown,
    )
    rows = bench(console, request)
    if args.json:
        _print_json(to_document(request, rows))
    return 0


def _report(args: argparse.Namespace, console: Console) -> int:
    if not HAS_TRITON:
        raise UserError("report compiles Triton kernels, and triton is not installed")
    from peft_kernels.tools.report.run import find, print_tables

    found = find(console)
    if args.json:
        _print_json(found.to_document())
    else:
        print_tables(console, found)
    return 1 if found.outside() else 0


def _tune(args: argparse.Namespace, console: Console) -> int:
    if not HAS_TRITON:
        raise UserError("tune measures Triton kernels on a GPU, and triton is not installed")
    from peft_kernels.tools import tune

    options = args.shapes, args.model, args.rank, args.dropout, args.dtype, args.weights
    if args.list and (args.dora or any(option is not None for option in options)):
        raise UserError("--list shows what is cached; it takes nothing but --json")
    if args.list:
        cached = tune.cached()
        if args.json:
            _print_json(cached)
        else:
            tune.print_cached(console, cached)
        return 0
    shapes = tune.shapes_of(args.shapes or (), args.model or (), args.rank or (tune.RANK,))
    dtypes, weights = tune.DTYPES, tune.WEIGHTS
    if args.dtype:
        dtypes = tuple(dict.fromkeys((args.dtype, a) for a in (torch.float32, args.dtype)))
    if args.weights:
        weights = tuple("" if kind == "dense" else kind for kind in args.weights)
    dropout_p = args.dropout or 0.0
    measurements = tune.tune(
        shapes, dtypes, weights=weights, dropout_p=dropout_p, dora=args.dora, console=console
    )
    if args.json:
        _print_json(tune.to_document(measurements))
    return 0


def _print_json(document: object) -> None:
    console_for().print_json(data=document)


# ---- arguments -------------------------------------------------------------------------------

_DESCRIPTION = "See, measure and tune the kernels. `peft-kernels COMMAND --help` says more of each."
_VERIFY = """\
Value and gradients of every op, by every plan, in float32, bfloat16 and float16, over weights of 4
and 8 bits too, in sizes that no tile divides; the same bits in a second run; a CUDA graph, captured
and replayed; tensors on a second GPU, if there is one. An error may be 1.5 times the eager path's.
On a GPU the first run compiles the kernels, in several processes. The exit code is 1 if anything is
wrong or fails.

  peft-kernels verify
  peft-kernels verify --op adapter prefix_attention --json
"""
_BENCH = """\
ops, and what MxNxK is of each:
  lora_linear, dora_linear         rows x outputs x inputs, of rank 16
  multi_lora_linear                rows x outputs x inputs, of rank 16
  adapter, adapter_fusion          tokens x hidden x bottleneck
  prefix_attention                 queries x heads x prefix, in a batch of 8
  prompt_lookup                    text x hidden x prompt, in a batch of 8

Implementations take turns in one process; a ratio is the median over rounds of one time over the
bare layer's. In brackets: the error against float64. Writes bench.json, and with matplotlib
bench.png.

  peft-kernels bench --shapes 512x2048x2048 --dtype bfloat16 --backward
  peft-kernels bench adapter --all --markdown out/bench/adapter.md
"""
_REPORT = """\
Takes minutes, and needs Triton and no GPU. The exit code is 1 if a kernel is outside of its budget:
no spills, shared memory within the chip's, tensor-core instructions where products are 16-bit.
"""
_TUNE = """\
Takes minutes, and needs Triton and a GPU. The plans go to plans.json in $PEFT_KERNELS_CACHE, by
default ~/.cache/peft_kernels, and hold for this kind of GPU and these versions of torch and Triton.

  peft-kernels tune --model llama-3-8b --rank 16 64
  peft-kernels tune --shapes 4096x4096x4096 --dropout 0.1 --dtype float16 --weights dense
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-kernels", description=_DESCRIPTION)
    version = f"%(prog)s {peft_kernels.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text, more in (
        ("doctor", _doctor, "what is installed here; which backend serves each op, and why", ""),
        (
            "verify",
            _verify,
            "compute every op on this machine and compare it with float64",
            _VERIFY,
        ),
        (
            "bench",
            _bench,
            "time an op beside its rivals, as ratios to the bare frozen layer",
            _BENCH,
        ),
        (
            "report",
            _report,
            "compile every GPU kernel; registers, spills, instructions, traffic",
            _REPORT,
        ),
        ("tune", _tune, "measure lora_linear's plans on this GPU and cache the fastest", _TUNE),
    ):
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        text = "print JSON; what is said to people goes to standard error"
        command.add_argument("--json", action="store_true", help=text)
        if name == "verify":
            _add_verify_arguments(command)
        if name == "bench":
            _add_bench_arguments(command)
        if name == "tune":
            _add_tune_arguments(command)
    return parser


def _add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", help="such as cuda:1 or cpu; default: the GPU, if there is one")
    add("--op", nargs="+", metavar="NAME", help="these ops alone; default: all")
    add("--dtype", nargs="+", type=_dtype, help="of float32, bfloat16, float16; default: all")
    add("--seed", type=int, default=0, help="of the values; default: %(default)s")
    add("--jobs", type=int, metavar="N", help="processes; default: 1 on a CPU, up to 8 on a GPU")


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", nargs="?", default="lora_linear", help="one of those below; default: %(default)s")
    add("--shapes", nargs="+", type=_shape, metavar="MxNxK", help="default: the op's own cases")
    add("--dtype", type=_dtype, help="float32, bfloat16 or float16; default: float32")
    add("--backward", action="store_true", help="time forward and backward")
    add("--all", action="store_true", help="every case of the op, on a GPU of language models")
    add("--compile", action="store_true", help="torch.compile of the composition, too (slow)")
    add("--device", default="cpu", help="such as cuda; default: %(default)s")
    add("--rounds", type=int, default=15, help="rounds at least; default: %(default)s")
    add("--seconds", type=float, default=1.0, help="for each implementation at least; default: 1")
    add("--out", type=Path, default=Path("out/bench"), help="folder; default: %(default)s")
    add("--markdown", type=Path, metavar="FILE", help="write the tables as markdown as well")


def _add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--list", action="store_true", help="show what is cached, and measure nothing")
    text = "rows x outputs x inputs; default: layers of 1B to 70B models, by 1 to 8192 rows"
    add("--shapes", nargs="+", type=_shape, metavar="MxNxK", help=text)
    text = "all layers of llama-3-8b, llama-3-70b, qwen2.5-7b or bert, by 1 to 8192 rows"
    add("--model", nargs="+", metavar="NAME", help=text)
    add("--rank", nargs="+", type=int, metavar="R", help="default: 16")
    add("--dropout", type=float, metavar="P", help="with dropout, which has plans of its own")
    text = "DoRA's forward over dense weights too, which has plans of its own"
    add("--dora", action="store_true", help=text)
    text = "of x, with adapters in float32 and in the same; default: bfloat16"
    add("--dtype", type=_dtype, help=text)
    text = "dense, nf4, fp4, int8 or fp8; default: dense nf4 int8"
    add("--weights", nargs="+", metavar="KIND", help=text)


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.lower().replace("×", "x").split("x")  # noqa: RUF001  the sign is what is meant
    if len(sizes) != 3 or not all(s.isdigit() and int(s) > 0 for s in sizes):
        raise argparse.ArgumentTypeError(f"a shape is MxNxK, such as 512x2048x2048; got {text!r}")
    m, n, k = map(int, sizes)
    return m, n, k


def _dtype(text: str) -> torch.dtype:
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if text not in found:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(found)}; got {text!r}")
    return found[text]


if __name__ == "__main__":
    raise SystemExit(main())
