"""Makes the golden files beside it, with transformers and peft; no test runs it.

    python tests/data/peft_golden/make.py            make the files anew
    python tests/data/peft_golden/make.py --check    compare the files with what these versions say
    ... --smollm2 FILE.gguf                          the same for smollm2.npz

It needs this project, transformers and peft in one environment, which should be a throwaway one:
the project itself does without both. They are asked for by name here, for the same reason.

seven/, two/     adapters of stories260K, written by peft: seven projections, and q and v alone in
                 bfloat16. Their numbers are random, B is not zero.
patterned/       a third one: rsLoRA in some layers, other ranks and alphas in some modules
exported/        the two configurations that we write and that peft and transformers opened: of
                 `seven` saved again by us, and of the exported model
golden.npz       ids_0, ids_1: token ids; and float32 logits of both, one below the other:
                 seven, two, patterned   transformers + peft, the adapter as peft wrote it
                 plain        transformers, the model as we export it (one file, and in shards)
                 merged       transformers, the model as we export it with `seven` merged
                 pissa, pissa_patterned   PiSSA adapters that peft made and plain gradient steps
                              moved; *_losses are those of the steps, pissa_rest is what peft left
                              of a weight
smollm2.npz      transformers on SmolLM2-135M-Instruct as we export it from its GGUF file: ids_0,
                 ids_1, and every 768th logit
made.json        versions, and by how much our own logits differed here (largest absolute)

Run it again when what we write changes: tests/model/test_export.py then says so.
"""

import argparse
import importlib
import json
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bioinstruct.model import load
from bioinstruct.model.adapters import CONFIG, Adapters, LoraSettings
from bioinstruct.model.checkpoint import open_checkpoint, save_checkpoint
from bioinstruct.model.llama import Llama, pack_documents
from bioinstruct.model.merging import merged_tensors

HERE = Path(__file__).parent
BASE = HERE.parent / "stories260K"
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNED = {
    "r": 4,
    "lora_alpha": 6,
    "use_rslora": True,
    "target_modules": SEVEN,
    "layers_to_transform": [0, 2, 4],
    "rank_pattern": {"model.layers.2.self_attn.q_proj": 2, "up_proj": 2},
    "alpha_pattern": {"v_proj": 8.0, "layers.4.mlp.down_proj": 8.0},
}
STARTS: dict[str, tuple[dict[str, Any], LoraSettings]] = {
    "pissa": (
        {"r": 4, "lora_alpha": 6, "target_modules": SEVEN},
        LoraSettings(r=4, alpha=6.0, init="pissa"),
    ),
    "pissa_patterned": (
        PATTERNED,
        LoraSettings(
            r=4,
            alpha=6.0,
            init="pissa",
            rslora=True,
            layers=(0, 2, 4),
            rank_pattern={"model.layers.2.self_attn.q_proj": 2, "up_proj": 2},
            alpha_pattern={"v_proj": 8.0, "layers.4.mlp.down_proj": 8.0},
        ),
    ),
}
RATE, STEPS = 0.003, 5  # of the gradient steps
REST = "model.layers.3.mlp.up_proj"
PROMPTS = "The patient was given 5 mg of warfarin daily.", "Question: what is ataxia?\nAnswer:"
ALLOWED = 1e-4


def module(name: str) -> Any:
    """Import a library that the project does without."""
    return importlib.import_module(name)


def their_model(folder: Path) -> Any:
    """Open a model folder in transformers, in float32."""
    return module("transformers").LlamaForCausalLM.from_pretrained(folder).float().eval()


def our_model(path: Path) -> Llama:
    """Open a model in this project, in float32."""
    checkpoint = open_checkpoint(path)
    model = Llama(checkpoint.config)
    checkpoint.load_into(model.destinations())
    return model


@torch.inference_mode()
def their_logits(model: Any, documents: list[list[int]]) -> Tensor:
    """Logits of every document alone, one below the other."""
    return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in documents])


@torch.inference_mode()
def our_logits(model: Llama, documents: list[list[int]], adapters: Adapters | None) -> Tensor:
    """The same of ours, all documents in one pack."""
    return model.logits(pack_documents(documents), adapters)


def documents_of_story() -> list[list[int]]:
    """Two pieces of a text that stories260K writes."""
    ids = np.load(BASE / "stories260K_golden.npz")["ids"].tolist()
    return [ids[:10], ids[60:66]]


def make_adapter(folder: Path, seed: int, dtype: torch.dtype, **settings: Any) -> None:
    """Let peft write an adapter of random numbers."""
    peft = module("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(their_model(BASE), config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
            if "lora_" in name:
                weight.data = weight.data.to(dtype)
    model.peft_config["default"].base_model_name_or_path = "stories260K"
    model.save_pretrained(folder, save_embedding_layers=False)  # which asks no network
    (folder / "README.md").unlink()


def export(folder: Path) -> None:
    """Write with this project what the other two are to open."""
    model = our_model(BASE)
    adapters = Adapters.load(HERE / "seven", model.config)
    adapters.save(folder / "adapter", "stories260K")
    config = model.config
    save_checkpoint(folder / "plain", config, merged_tensors(model, None))
    save_checkpoint(folder / "shards", config, merged_tensors(model, None), max_shard_bytes=300_000)
    save_checkpoint(folder / "merged", config, merged_tensors(model, adapters))


def outputs(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Logits by transformers and peft of what they wrote and of our exports, and our errors."""
    documents, peft, ours = documents_of_story(), module("peft"), our_model(BASE)
    export(folder)

    def with_adapter(path: Path) -> Tensor:
        model = peft.PeftModel.from_pretrained(their_model(BASE), path)
        return their_logits(model.eval(), documents)

    own = ("seven", "two", "patterned")
    places = {name: HERE / name for name in own} | {"exported seven": folder / "adapter"}
    golden = {name: with_adapter(path) for name, path in places.items()}
    for name in ("plain", "shards", "merged"):
        golden[name] = their_logits(their_model(folder / name), documents)
    adapters = {name: Adapters.load(path, ours.config) for name, path in places.items()}
    adapters["merged"] = adapters["seven"]
    errors = {
        name: float((our_logits(ours, documents, adapters.get(name)) - logits).abs().max())
        for name, logits in golden.items()
    }
    return golden, errors


def peft_s_pissa(name: str) -> dict[str, Tensor]:
    """Let peft start an adapter by PiSSA and train it: losses, logits, and a weight's rest."""
    peft, documents = module("peft"), documents_of_story()
    settings = {"task_type": "CAUSAL_LM", "init_lora_weights": "pissa", **STARTS[name][0]}
    with warnings.catch_warnings():
        # peft cannot export rsLoRA with patterns
        warnings.filterwarnings("ignore", "Using Rank-Stabilized LoRA", UserWarning)
        config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(their_model(BASE), config)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    losses = []
    for _ in range(STEPS):
        loss = torch.tensor(0.0)
        for ids in documents:
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            loss = loss + cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum")
        losses.append(loss.detach())
        with torch.no_grad():
            for weight, grad in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                weight -= RATE * grad
    logits, rest = their_logits(model, documents), model.get_submodule(f"base_model.model.{REST}")
    found = {name: logits, f"{name}_losses": torch.stack(losses)}
    return found | (
        {f"{name}_rest": rest.base_layer.weight[:16].detach()} if name == "pissa" else {}
    )


def our_pissa(name: str, folder: Path) -> Tensor:
    """The same by us, saved to a folder; our logits."""
    model, documents = our_model(BASE), documents_of_story()
    adapters = Adapters(model.config, STARTS[name][1])
    adapters.take_principal(model.destinations(), 0)
    labels, rows = labels_of(documents)
    for _ in range(STEPS):
        logits = model.logits(pack_documents(documents), adapters)[rows]
        cross_entropy(logits, labels, reduction="sum").backward()
        adapters.flat_P.sub_(adapters.grad_P, alpha=RATE)
        adapters.grad_P.zero_()
    adapters.save(folder, "stories260K")
    return our_logits(model, documents, adapters)


def labels_of(documents: list[list[int]]) -> tuple[Tensor, list[int]]:
    """The next token of every token that has one, and their rows in the pack."""
    places = [(d, i) for d, ids in enumerate(documents) for i in range(len(ids))]
    rows = [row for row, (d, i) in enumerate(places) if i + 1 < len(documents[d])]
    return torch.tensor([documents[places[r][0]][places[r][1] + 1] for r in rows]), rows


def pissa_outputs(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What peft gets, and how far ours is from it, and our files in peft from ours."""
    golden: dict[str, Tensor] = {}
    errors = {}
    for name in STARTS:
        golden |= peft_s_pissa(name)
        ours = our_pissa(name, folder / name)
        model = module("peft").PeftModel.from_pretrained(their_model(BASE), folder / name)
        opened = their_logits(model.eval(), documents_of_story())
        errors[name] = float((ours - golden[name]).abs().max())
        errors[f"exported {name}"] = float((ours - opened).abs().max())
    return golden, errors


def smollm2_outputs(path: Path, folder: Path) -> tuple[dict[str, Any], float]:
    """Export a GGUF model and open it in transformers: what goes to smollm2.npz, and our error."""
    llm = load(path, dtype="float32", device="cpu")
    documents = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    save_checkpoint(folder / "smollm2", llm.config, merged_tensors(llm.model, None))
    theirs = their_logits(their_model(folder / "smollm2"), documents)
    error = float((torch.cat(llm.logits(documents)) - theirs).abs().max())
    return ids_of(documents) | {"logits": theirs[:, ::768].numpy()}, error


def ids_of(documents: list[list[int]]) -> dict[str, Any]:
    """Token ids as the files hold them."""
    return {f"ids_{i}": np.array(document) for i, document in enumerate(documents)}


def main() -> None:
    """Make the files, or compare with them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="a GGUF file of SmolLM2")
    arguments = parser.parse_args()
    warnings.simplefilter("error", UserWarning)  # peft warns of tensors that do not fit
    # an older peft reads what a newer one wrote
    warnings.filterwarnings("ignore", "Unexpected keyword arguments", UserWarning)
    if not arguments.check:
        make_adapter(HERE / "seven", 0, torch.float32, r=4, lora_alpha=6, target_modules=SEVEN)
        make_adapter(
            HERE / "two", 1, torch.bfloat16, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        )
        make_adapter(HERE / "patterned", 2, torch.float32, **PATTERNED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        golden, errors = outputs(folder)
        started, more = pissa_outputs(folder)
        arrays = kept(golden) | {name: tensor.numpy() for name, tensor in started.items()}
        files = {"golden.npz": ids_of(documents_of_story()) | arrays}
        errors |= more
        if arguments.smollm2:
            files["smollm2.npz"], errors["smollm2"] = smollm2_outputs(arguments.smollm2, folder)
        if not arguments.check:
            write(folder, files, errors)
    # what they compute on our files is what they compute on their own
    again = {"exported seven": "seven", "shards": "plain"}
    assert all(torch.equal(golden[ours], golden[theirs]) for ours, theirs in again.items())
    for name, arrays in files.items():
        stored = np.load(HERE / name)
        for key, array in arrays.items():
            print(f"{name} {key}: {np.abs(stored[key] - array).max():.1e} from the file")
    print(json.dumps(versions() | {"our largest errors": errors}, indent=2))
    assert max(errors.values()) < ALLOWED, "ours differ"


def kept(golden: dict[str, Tensor]) -> dict[str, Any]:
    """The logits that go to golden.npz."""
    return {name: golden[name].numpy() for name in ("seven", "two", "patterned", "plain", "merged")}


def versions() -> dict[str, str]:
    """What computed the numbers."""
    names = ("transformers", "peft", "torch", "safetensors", "numpy")
    return {name: version(name) for name in names}


def write(folder: Path, files: dict[str, dict[str, Any]], errors: dict[str, float]) -> None:
    """Put the golden files beside this one."""
    exported = HERE / "exported"
    exported.mkdir(exist_ok=True)
    for source in (folder / "plain" / "config.json", folder / "adapter" / CONFIG):
        (exported / source.name).write_bytes(source.read_bytes())
    for name, arrays in files.items():
        np.savez_compressed(HERE / name, **arrays)
    made = {"versions": versions(), "our_largest_errors": errors}
    (HERE / "made.json").write_text(json.dumps(made, indent=2) + "\n")


if __name__ == "__main__":
    main()
