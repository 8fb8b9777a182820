"""Fingerprints of what a user gets, to show that a change of the code changed none of it.

    python tools/fingerprint.py --out before.json --keep made_before
    python tools/fingerprint.py --against before.json --old made_before

The first command types what users type (training, conversions, encoding, pictures), lowers the
full-size programs, and writes a line for each thing found: a hash, or the words themselves. The
second does it again, with other code, prints each line that differs, and exits with 1 if one does.
--old opens what earlier code wrote; give it both times. Pixels and losses are those of one machine
and one version of JAX: take both fingerprints on the same. `lowered` needs libtpu
(pip install 'jax[tpu]'), and no TPU. A command that fails is an item too: its value says how.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
Items = dict[str, str]


# All that names modules of the package. The rest of this file knows commands and files.


def lowered_programs() -> Iterator[tuple[str, Callable[[], Items]]]:
    """Name and lowered text of each full-size program, as `plan` compiles it."""
    from kontext_jax.plan import programs, sampling, targets
    from kontext_jax.terminal import load_config
    from kontext_jax.training import config as train_config

    def step(name: str, topology: str) -> Items:
        config = train_config.parse(load_config(ROOT / f"configs/{name}.py"), [])
        inputs = programs.default_inputs(config)
        planned = programs.training_step(config, targets.find_target(topology), *inputs)
        return text_items(planned.program.lower().as_text())

    def request(topology: str, **options) -> Items:
        target = targets.find_target(topology)
        stages = sampling.sampling_stages(sampling.Request(**options), target)
        texts = {stage.name: stage.planned.program.lower().as_text() for stage in stages}
        return {f"{s} {key}": x for s in texts for key, x in text_items(texts[s]).items()}

    for topology, names in LOWERED_STEPS.items():
        for name in names:
            yield f"{name} on {topology}", lambda name=name, t=topology: step(name, t)
    yield "request on v5p", lambda: request("v5p")
    split = {"mesh": {"context": 4}, "num_references": 2, "sampler": "renoise"}
    yield "request on v5p:2x2x1", lambda: request("v5p:2x2x1", **split)


def encoded_arrays(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """All arrays of a folder of encoded examples, by names that do not depend on its files."""
    from kontext_jax.data.encoded.batches import EncodedCache

    cache = EncodedCache(folder)
    yield from zip(("null txt", "null vec"), cache.null_text(), strict=True)
    for sample, id_ in enumerate(cache.ids):
        yield from zip((f"{id_} txt", f"{id_} vec"), cache.text(sample), strict=True)
        for variant in range(cache.num_variants(sample)):
            x0, contexts = cache.latents(sample, variant)
            for i, array in enumerate((x0, *contexts)):
                yield f"{id_} crop {variant} picture {i}", array


LOWERED_STEPS = {  # hardware → configs
    "v5p:4x4x4": ("kontext_joint", "t2i_pretrain", "guidance_distill", "ladd", "vae_flux"),
    "v5p:2x2x2": ("finetune",),
    "v5p": ("lora",),
}
CAT, SHAPES = ["example:cat"], ["example:shapes"]
REQUESTS = [  # for both models
    {"prompt": "tint the picture blue", "images": CAT},
    {"prompt": "put a red frame around the picture", "images": CAT, "seed": 3},
    {"prompt": "make it gray", "images": CAT, "seed": 4294967295},
    {"prompt": "make it night", "images": CAT, "num_images": 3, "seed": 7},
    {"prompt": "move the red circle to the center", "images": SHAPES},
    {"prompt": "make the red circle blue", "images": SHAPES, "seed": 5},
    {"prompt": "remove the red circle", "images": SHAPES, "num_steps": 5},
    {"prompt": "add a green square", "images": SHAPES, "then": ["make it gray"]},
    {"prompt": "make it night", "images": CAT, "then": ["add snow", "flip it"], "seed": 2},
    {"prompt": "a red circle and a blue square"},
    {"prompt": "a red house by the sea", "seed": 11, "num_images": 2},
    {"prompt": "a green triangle", "then": ["make the green triangle red"]},
    {"prompt": "the cat in front of the shapes", "images": CAT + SHAPES},
    {"prompt": "both", "images": SHAPES + CAT, "position_rule": "width", "num_steps": 3},
    {"prompt": "a wide shot", "images": CAT, "size": "16:9"},
    {"prompt": "a small shot", "images": CAT, "size": "128x96", "num_steps": 4},
    {"prompt": "a rough sketch", "images": CAT, "megapixels": 0.002},
    {"prompt": "make it night", "images": CAT, "restore_size": True},
    {"prompt": "as it is", "images": SHAPES, "reference_size": "match", "size": "64x64"},
    {"prompt": "a red house", "negative_prompt": "people", "true_cfg_scale": 2},
    {"prompt": "tint the picture red", "images": CAT, "true_cfg_scale": 4, "negative_prompt": ""},
    {"prompt": "make it gray", "images": CAT, "numerics": "bfl", "num_steps": 4},
    {"prompt": "make it gray", "images": CAT, "numerics": "diffusers", "num_steps": 4},
    {"prompt": "uneven", "images": CAT, "timesteps": [1, 0.9, 0.4], "text_mask": True},
]
# What is typed after `python`. @ is where the command writes, @part/name where another one wrote,
# @old where an earlier call of this script did; .x=1 stands for --config.x=1.
MODELS, GOLDENS = "kontext_jax/assets/models", "tests/goldens"
EDIT = "-o @/picture.png --image example:cat --prompt 'make it night'"
QUICKLY = "JAX_DISABLE_MOST_OPTIMIZATIONS=1"  # where compiling would take nearly all of the time
TWO = "XLA_FLAGS=--xla_force_host_platform_device_count=2"
TINY = "train.py --config configs/tiny.py --workdir @"
WARM, NO_EVAL = ".optimizer.warmup_steps=2", ".eval.every_steps=0 .eval.sample_every_steps=0"
BRIEF = f"{TINY} {WARM} {NO_EVAL} .eval.sources="
SHORT = (
    f"{QUICKLY} train.py --workdir @ .num_steps=3 .batch_size=4 .log.every_steps=1 "
    ".eval.every_steps=3 .eval.num_batches=1 .eval.sample_every_steps=3 .eval.sample_rows=2"
)
CACHED = f"{SHORT} .encoders={MODELS}/tiny .eval.cache=@encoding/scenes .data.cache="
DISTIL = f"{CACHED}@encoding/scenes .weights={MODELS}"
LORA = ".train=lora .lora.rank=4 .ema_decay=0 .encoders= .weights=@training/tiny"
TO_JAX, TO_TORCH = "-m convert_weights to-jax --out @", "-m convert_weights to-torch --out @"
INSPECT, AXES = "-m convert_weights inspect", "--axes-dim 4,6,6"
BFL = f"{GOLDENS}/bfl/flux1-tiny.safetensors"
ENCODE, SYNTHESIZE = (f"-m kontext_jax.data.{x} --out @" for x in ("encode", "synthesize"))
COMMANDS = {
    "training/tiny": TINY,
    "training/lora": f"{BRIEF} .num_steps=6 {LORA}",
    "training/two-devices": f"{TWO} {BRIEF} .num_steps=3 .mesh.fsdp=2",
    "resuming/broken": f"{QUICKLY} {BRIEF} .num_steps=5 && {QUICKLY} {BRIEF} .num_steps=10",
    "resuming/whole": f"{QUICKLY} {BRIEF} .num_steps=10",
    "resuming/broken-weights": f"{TO_JAX} @resuming/broken",
    "resuming/whole-weights": f"{TO_JAX} @resuming/whole",
    "encoding/scenes": f"{ENCODE} scenes:easy:train:24 --resolution 64 --weights {MODELS}/tiny",
    "encoding/synthetic": f"{SYNTHESIZE} --cache @encoding/scenes --model {MODELS}/tiny --limit 8",
    "objectives/guidance": f"{DISTIL}/tiny --config configs/tiny_guidance_distill.py {WARM} "
    ".data.synthetic_cache=@encoding/synthetic",
    "objectives/policy": f"{DISTIL}/tiny-fast --config configs/tiny_policy.py {WARM}",
    "objectives/ladd": f"{DISTIL}/tiny-fast --config configs/tiny_ladd.py",
    "objectives/autoencoder": f"{SHORT} --config configs/scenes_vae.py {WARM}",
    "conversions/run-bfl": f"{TO_TORCH} @training/tiny --layout bfl",
    "conversions/run-diffusers": f"{TO_TORCH} @training/tiny --layout diffusers",
    "conversions/run-jax": f"{TO_JAX} @training/tiny --which params --step 15",
    "conversions/jax": f"{TO_JAX} {GOLDENS}/model",
    "conversions/jax-half": f"{TO_JAX} {GOLDENS}/model --dtype float16",
    "conversions/jax-bfl": f"{TO_JAX} {BFL} {GOLDENS}/bfl/ae.safetensors --preset tiny {AXES}",
    "conversions/bfl": f"{TO_TORCH} @conversions/jax --layout bfl",
    "conversions/diffusers": f"{TO_TORCH} @conversions/jax --layout diffusers",
    "conversions/mix": "-m convert_weights mix @resuming/whole @training/tiny --share .25 --out @",
    **{
        f"conversions/lora-{x}": f"-m convert_weights lora @training/lora --layout {x} --out @"
        for x in ("peft", "kohya", "bfl")
    },
    "conversions/inspect-jax": f"{INSPECT} @conversions/jax",
    "conversions/inspect-diffusers": f"{INSPECT} {GOLDENS}/model",
    "conversions/inspect-bfl": f"{INSPECT} {BFL} {AXES}",
    "conversions/check": f"-m convert_weights check {GOLDENS}/model @conversions/bfl {AXES}",
    "pictures/tiny": "sample.py --model tiny --jobs @jobs.jsonl -o @",
    "pictures/tiny-fast": "sample.py --model tiny-fast --jobs @jobs.jsonl -o @",
    "pictures/demo": "sample.py -o @/picture.png",
    "pictures/again": "sample.py --from-metadata @pictures/demo/picture.png -o @/picture.png",
    "pictures/one-step": f"sample.py --model tiny-fast --steps 1 {EDIT}",
    "pictures/guidance": f"sample.py --model tiny-fast --guidance 1.5 --sampler euler {EDIT}",
    "pictures/untrained": f"sample.py --model untrained {EDIT}",
    "pictures/half": f"sample.py --dtype bfloat16 {EDIT}",
    "pictures/tiles": f"sample.py --tile on --size 256x192 --steps 2 {EDIT}",
    "pictures/run": f"sample.py --weights @training/tiny {EDIT}",
    "pictures/raw": f"sample.py --weights @training/tiny --raw-params --checkpoint 15 {EDIT}",
    "pictures/lora": f"sample.py --weights @training/tiny --lora @training/lora:0.7 {EDIT}",
    "pictures/peft": f"sample.py --weights @training/tiny --lora @conversions/lora-peft {EDIT}",
    "pictures/two-devices": f"{TWO} sample.py --mesh context=2 {EDIT}",
    "old/run": f"sample.py --weights @old/training/tiny {EDIT}",
    "old/lora": f"sample.py --weights @old/training/tiny --lora @old/training/lora {EDIT}",
    "old/weights": f"sample.py --weights @old/conversions/mix {EDIT}",
    "old/again": "sample.py --from-metadata @old/pictures/demo/picture.png -o @/picture.png",
    "old/resumed": f"cp @old/training/tiny @ && {TINY} {NO_EVAL} .eval.sources= .num_steps=32",
    "old/cache": f"{CACHED}@old/encoding/scenes .weights={MODELS}/tiny-fast {WARM} "
    "--config configs/tiny_policy.py",
}
PARTS = (*dict.fromkeys(name.split("/")[0] for name in COMMANDS), "lowered")


class Work:
    """The folder in which commands write, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        # Compiled programs begin anew: one kept by other code would hide what this code does.
        self._env = {**os.environ, "KONTEXT_JAX_CACHE": str(folder / "programs"), "COLUMNS": "120"}
        (folder / "jobs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in REQUESTS))

    def items(self, name: str) -> Items:
        """What a command wrote, or else what it printed.

        Raises:
          ValueError: it, or one whose results it needs, ended with an error.
        """
        path, printed = self.folder / name, self._make(name)
        if not path.exists():
            return {"printed": re.sub(r" +\n", "\n", printed)}
        if (path / "metrics.jsonl").exists():
            # What depends on the run alone: its lines but those of speed, its grids of samples.
            lines = (path / "metrics.jsonl").read_text().splitlines()
            lines = {"{kind} {step}".format(**json.loads(line)): line for line in lines}
            lines = {key: line for key, line in lines.items() if not key.startswith("speed")}
            return lines | self._picture_items(path / "samples")
        if (path / "manifest.json").exists():
            arrays = encoded_arrays(path)
            return {n: f"{x.dtype} {x.shape} {digest(x.tobytes())}" for n, x in arrays}
        files = [x for x in (path, *sorted(path.rglob("*"))) if x.is_file()]
        names = [x.relative_to(path.parent).as_posix() for x in files]
        hashes = [digest(self._without_paths(x.read_bytes())) for x in files]
        return self._picture_items(path) or dict(zip(names, hashes, strict=True))

    def _without_paths(self, text: bytes) -> bytes:
        text = text.replace(os.fsencode(self.folder), b"WORK")
        return text.replace(os.fsencode(ROOT), b"ROOT")

    def _make(self, name: str) -> str:
        """Runs a command if it did not run before; what it printed."""
        path, printed = self.folder / name, b""
        if path.exists() or name not in COMMANDS:
            return ""
        path.parent.mkdir(exist_ok=True)
        for command in COMMANDS[name].split(" && "):
            command = re.sub(r"@([\w/.-]*)", lambda match: self._path(path, match[1]), command)
            words = shlex.split(re.sub(r"(?<= )\.(?=[a-z])", "--config.", command))
            env = dict(self._env)
            while re.match(r"[A-Z_]+=", words[0]):
                env.update([words.pop(0).split("=", 1)])
            if words[0] == "cp":
                shutil.copytree(*words[1:])
                continue
            ran = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True)
            printed += ran.stdout
            if ran.returncode:
                shutil.rmtree(path, ignore_errors=True)  # so that nobody builds on it
                lines = [x for x in ran.stderr.splitlines() if b"rror" in x] or [b"no message"]
                said = b"exit %d: %s" % (ran.returncode, lines[-1])
                raise ValueError(self._without_paths(said).decode())
        return self._without_paths(printed).decode()

    def _path(self, own: Path, other: str) -> str:
        """Where a command writes or wrote; another one is run if it did not."""
        if not other or other.startswith("/"):
            return f"{own}{other}"
        self._make("/".join(other.split("/")[:2]))
        return str(self.folder / other)

    def _picture_items(self, folder: Path) -> Items:
        """Pixels of all pictures of a folder, and what their metadata say but for versions."""
        found = {}
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as image:
                pixels = repr((image.mode, image.size)).encode() + image.tobytes()
                metadata = json.loads(image.info.get("kontext_jax", "{}"))
            metadata.pop("versions", None)
            metadata = self._without_paths(json.dumps(metadata, sort_keys=True).encode())
            found |= {f"{path.name} pixels": digest(pixels), f"{path.name} data": digest(metadata)}
        return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def text_items(text: str) -> Items:
    """Length and hash of a lowered program, without places in the source and names of functions.

    Private functions are numbered as they appear. The name of a result says how Python's containers
    call it. The bodies of TPU kernels are bytecode with paths in it; they are read and printed.
    """
    from jax._src.interpreters.mlir import make_ir_context
    from jax._src.lib import tpu
    from jax._src.lib.mlir import ir

    def kernel(match: re.Match) -> str:
        with make_ir_context() as context:
            tpu.register_dialect(context)
            context.allow_unregistered_dialects = True
            printed = str(ir.Module.parse(base64.b64decode(match[1])))
        return f"kernel {digest(printed.encode())}"

    text = re.sub(r"(?<=body\\22: \\22)([A-Za-z0-9+/=]+)(?=\\22)", kernel, text)
    text = re.sub(r",? ?jax\.result_info = \"[^\"]*\"", "", text)
    text = re.sub(r"(?m)^#loc.*\n| loc\(.*\)$", "", text)
    text = re.sub(r"^module @\S+", "module", text)
    symbol = r"@(\"[^\"]*\"|[\w.$-]+)"
    private = re.findall(rf"func\.func private {symbol}", text)
    numbers = {name: f"f{number}" for number, name in enumerate(private)}
    text = re.sub(symbol, lambda match: f"@{numbers.get(match[1], match[1])}", text)
    return {"length": str(len(text)), "sha256": digest(text.encode())}


def take(work: Work, parts: list[str]) -> Items:
    """The items of these parts, with a line for each piece of work."""
    jobs = [(x, lambda x=x: work.items(x)) for x in COMMANDS if x.split("/")[0] in parts]
    if "lowered" in parts:
        jobs += [(f"lowered/{name}", lower) for name, lower in lowered_programs()]
    items = {}
    for name, make in jobs:
        start = time.monotonic()
        try:
            found = make()
        except Exception as error:  # what fails is a finding, and the rest is still wanted
            found = {"error": f"{type(error).__name__}: {error}"}
            print(f"{name}: {found['error']}", file=sys.stderr)
        items |= {f"{name}/{key}": value for key, value in found.items()}
        print(f"{name}: {len(found)} items, {time.monotonic() - start:.0f} s", flush=True)
    if "resuming" in parts:
        broken, whole = (
            [x for key, x in items.items() if re.match(rf"resuming/{n}(/|.*safetensors)", key)]
            for n in ("broken", "whole")
        )
        items["resuming/5 + 5 steps are 10"] = str(broken == whole != [])
    return items


def main() -> int:
    """Takes the fingerprints; the exit status: 1 if some differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="file to write")
    what.add_argument("--against", type=Path, metavar="FILE", help="a file of --out, to compare")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--keep", type=Path, metavar="DIR", help="new folder for all that is made")
    parser.add_argument("--old", type=Path, metavar="DIR", help="an earlier --keep, to be opened")
    args = parser.parse_args()
    parts = args.only or [part for part in PARTS if part != "old" or args.old]
    if "old" in parts and not args.old:
        parser.error("--only old needs --old DIR")
    os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}
    sys.path.insert(0, str(ROOT))  # this tree, whichever is installed
    expected = json.loads(args.against.read_text()) if args.against else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).resolve()
        if args.keep:
            folder.mkdir(parents=True)  # one that exists could hold what other code made
        if args.old:
            shutil.copytree(args.old, folder / "old", ignore=shutil.ignore_patterns("programs"))
        found = take(Work(folder), parts)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    expected = {name: x for name, x in expected.items() if name.split("/")[0] in parts}
    names = [n for n in {**expected, **found} if found.get(n) != expected.get(n)]
    for n in names:
        print(f"{n}\n  found    {found.get(n, 'nothing')}\n  expected {expected.get(n, 'nothing')}")
    print(f"{len(names)} of {len(expected)} items differ")
    return 1 if names else 0


if __name__ == "__main__":
    sys.exit(main())
