"""The parts of `toy_lvlm.py`: its data, the tiny CLIP, the small language model, and the LLaVA that joins them.

Shapes: N pictures, B batch, L tokens, S the picture's side in pixels.   1 Data  2 Parts  3 LLaVA  4 Saved models
"""

import base64
import io
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

from lab.moe import baselines, moefication
from lab.moe.film import Shown, evenly, look_at
from lab.run.cli import UserError, printable
from lab.run.files import write_json
from lab.run.hub import Checkpoint
from lab.run.options import spec_options
from lab.run.reading import fits
from lab.vision.instructions import (
    EOS,
    IGNORED,
    IMAGE,
    PAD,
    Collate,
    Encoded,
    Instruction,
    InstructionSet,
    Pack,
    Pixels,
    encode,
    make_packs,
    make_tokenizer,
)
from lab.vision.llava import Problems, load_llava
from lab.vision.scenes import make_scenes
from stgc import MoELayer

SIZE = 64  # of a picture without a pretrained CLIP, in pixels
CAPTION = 77  # positions of a tiny CLIP's text, its end included
PATCH = 32  # a cell of lab.vision.scenes: with smaller patches the language model hardly learns where the things are

# ---- 1. Data ----


@dataclass(frozen=True)
class Data:
    """The data of a run, its tokenizer and its pixel format."""

    name: str
    train: InstructionSet
    test: InstructionSet
    captions: tuple[list[str], list[str]]  # of the pictures of train and test, for a CLIP
    tokenizer: object
    pixels: Pixels
    image_tokens: int  # per picture
    encoded: list[Encoded]  # of train

    @property
    def image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(IMAGE)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id


def captions_of(data: InstructionSet) -> list[str]:
    """One text per picture: the answer to its first caption instruction, or else its first question and answer."""
    texts: dict[int, str] = {}
    for one in sorted(data.instructions, key=lambda one: one.kind != "caption"):
        question, answer = one.turns[0]
        text = answer if one.kind == "caption" else f"{question.replace(IMAGE, '').strip()} {answer}"
        texts.setdefault(one.image, text)
    return [texts[picture] for picture in range(len(data.images_N3SS))]


def hold_out(data: InstructionSet) -> list[InstructionSet]:
    """Holds out a tenth of the pictures for testing, at least one, with all their instructions, and a tenth of the
    conversations without a picture. Copies of a picture, or of such a conversation, are on the same side."""
    contents = [blake2b(image.numpy()).digest() for image in data.images_N3SS]
    keys = [one.turns if one.image is None else contents[one.image] for one in data.instructions]
    order = sorted(dict.fromkeys(keys), key=lambda key: isinstance(key, tuple))  # pictures first
    random.Random(0).shuffle(order)
    with_picture, text_only = ([key for key in order if isinstance(key, kind)] for kind in (bytes, tuple))
    if len(with_picture) == 1:
        raise UserError("--data: one picture cannot be both trained and tested on; give more, or --eval-data")
    chosen = {*with_picture[: max(1, len(with_picture) // 10)], *text_only[: len(text_only) // 10]}
    sides = ([one for key, one in zip(keys, data.instructions) if (key in chosen) == test] for test in (False, True))
    return [select(data.images_N3SS, side) for side in sides]


def select(images_N3SS: Tensor, instructions: Sequence[Instruction]) -> InstructionSet:
    """The instructions, with only the pictures that they use."""
    used = sorted({one.image for one in instructions if one.image is not None})
    rows = {picture: row for row, picture in enumerate(used)}
    return InstructionSet(images_N3SS[used], [replace(one, image=rows.get(one.image)) for one in instructions])


def load_data(args, clip: CLIPModel | None, tokenizer, problems: Problems) -> Data:
    """Generated scenes, or the user's data. `clip` and `tokenizer`: of pretrained parts, otherwise None. UserError."""
    pixels = Pixels(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)) if clip is None else clip_pixels(args.clip, clip)
    if args.data:
        load = partial(load_llava, image_dir=args.image_dir, size=pixels.size, problems=problems)
        train = load(args.data, flag="--data")
        if args.eval_data:
            sets = [train, load(args.eval_data, flag="--eval-data")]
            trained_on, tested_on = ({blake2b(image.numpy()).digest() for image in own.images_N3SS} for own in sets)
            problems.shared = len(trained_on & tested_on)
        else:
            sets = hold_out(train)
        name = printable(Path(args.data).stem)
    else:
        scenes = make_scenes(args.scenes, args.test_scenes, size=pixels.size)
        sets, name = [scenes["train"], scenes["test"]], "scenes"
    if tokenizer is None:
        texts = (text for one in sets[0].instructions for question, answer in one.turns for text in (question, f" {answer}"))
        tokenizer = make_tokenizer(texts)
    image_tokens = count_patches(clip.config.vision_config) if clip else (SIZE // PATCH) ** 2
    encoded = []
    for number, own in enumerate(sets):
        found = encode([one.turns for one in own.instructions], tokenizer, image_tokens)
        fits = [len(one.input_ids) <= args.max_length for one in found]
        if not all(fits) and not args.data:
            raise UserError(f"--max-length {args.max_length}: generated scenes need {max(len(e.input_ids) for e in found)}")
        for instruction, one, good in zip(own.instructions, found, fits):
            if not good:
                length = f"{len(one.input_ids)} tokens with picture and answer"
                problems.add(instruction.place, f"too long: {length}, --max-length is less")
        encoded.append([one for one, good in zip(found, fits) if good])
        if not encoded[-1]:
            raise UserError(f"--max-length {args.max_length}: every conversation is longer; raise it")
        sets[number] = select(own.images_N3SS, [one for one, good in zip(own.instructions, fits) if good])
        if not any(one.image is not None for one in sets[number].instructions):
            flag = "--eval-data" if args.eval_data and number else "--data"
            side = ("training", "test")[number]
            raise UserError(f"{flag}: no {side} conversation has a picture, and this model needs pictures")
    captions = tuple(map(captions_of, sets))
    return Data(name, *sets, captions, tokenizer, pixels, image_tokens, encoded[0])


def sample_values(data: Data, model: PreTrainedModel, rows: Tensor, input_ids: Tensor, asked: Tensor) -> dict:
    """What `baselines.Samples.set` needs in addition to the mask, for a batch of single conversations: the question's
    tokens, its cluster, its task family. CHOICE: an instruction's embedding is the mean of its tokens', as the model's input
    table has them."""
    kinds = [data.train.instructions[row].kind for row in rows.tolist()]
    task_B = torch.tensor([baselines.FAMILIES[kind] for kind in kinds], device=input_ids.device)
    return {"task_B": task_B} | question_values(model, input_ids, asked)


@torch.no_grad()
def question_values(model: PreTrainedModel, input_ids: Tensor, asked: Tensor) -> dict:
    """Those of `sample_values` that are known without the task, for generating an answer."""
    values = {"instruction_BL": asked}
    router = next((module for module in model.modules() if isinstance(module, baselines.EmbeddingRouter)), None)
    if router:
        tokens_BLD, count_B1 = model.get_input_embeddings()(input_ids), asked.sum(1, keepdim=True).clamp_min(1)
        embeddings_BD = (tokens_BLD * asked.unsqueeze(2)).sum(1) / count_B1
        values["cluster_B"] = baselines.nearest_cluster(embeddings_BD, router.centres_CD)
    return values


# ---- 2. Parts ----


def count_patches(vision_config) -> int:
    return (vision_config.image_size // vision_config.patch_size) ** 2


def special_ids(tokenizer) -> dict:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def caption_end(tokenizer) -> int:
    """The token at which CLIP pools a caption. transformers treats the id 2 as that of an old checkpoint and pools
    elsewhere."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id != 2 else len(tokenizer)


def make_clip(tokenizer) -> CLIPModel:
    """A tiny, untrained CLIP: four layers for pictures, two for texts, width 128."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    end, layers = caption_end(tokenizer), {"num_hidden_layers": 2, "max_position_embeddings": CAPTION}
    text = shape | layers | {"vocab_size": max(len(tokenizer), end + 1)} | special_ids(tokenizer) | {"eos_token_id": end}
    vision = shape | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))
    # larger than a patch embedding. With std 0.02, the usual start, the features of a frozen CLIP hardly encode where in the
    # picture a thing is. With 0.5, place is a twelfth of its tokens' variance, and the language model learns late to use it.
    nn.init.normal_(clip.vision_model.embeddings.position_embedding.weight, std=1.0)
    return clip


def find_clip(name: str) -> tuple[Checkpoint, PreTrainedConfig]:
    checkpoint = Checkpoint("--clip", name, "give a folder (--clip DIR), or leave --clip out: a tiny one is trained")
    config = checkpoint.config("the CLIP")
    if config.model_type != "clip":
        checkpoint.refuse(f"it is a {config.model_type}, not a CLIP")
    return checkpoint, config


def load_clip(checkpoint: Checkpoint, config: PreTrainedConfig) -> CLIPModel:
    return checkpoint.model("the CLIP", CLIPModel, config, dtype=torch.float32)


def clip_pixels(name: str, clip: CLIPModel) -> Pixels:
    checkpoint, vision = Checkpoint("--clip", name), clip.config.vision_config
    processor = checkpoint.load("the image processor", CLIPImageProcessorPil)
    triples = lambda: (tuple(map(float, own)) for own in (processor.image_mean, processor.image_std))  # noqa: E731
    card = checkpoint.guard("the image processor", lambda: Card(vision.image_size, *triples(), count_patches(vision)))
    return card.pixels


class CollateClip:
    """Pictures with captions, for the contrastive loss of `CLIPModel`. `cut`: how many captions are longer than it reads."""

    def __init__(self, images_N3SS: Tensor, captions: Sequence[str], tokenizer, pixels: Pixels):
        self.images_N3SS, self.pixels, self.pad_id = images_N3SS, pixels, tokenizer.pad_token_id
        plain = tokenizer(list(captions), split_special_tokens=True)["input_ids"]  # an end inside a text is text
        self.ids = [[*ids[: CAPTION - 1], caption_end(tokenizer)] for ids in plain]
        self.cut = sum(len(ids) >= CAPTION for ids in plain)

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, rows: Sequence[int]) -> dict:
        length = max(len(self.ids[row]) for row in rows)
        ids_BL = torch.tensor([self.ids[row] + [self.pad_id] * (length - len(self.ids[row])) for row in rows])
        return {
            "input_ids": ids_BL,
            "attention_mask": (ids_BL != self.pad_id).long(),
            "pixel_values": self.pixels.values(self.images_N3SS[torch.tensor(rows)]),
        }


@torch.no_grad()
def retrieval(clip: CLIPModel, collate: CollateClip, group: int = 64) -> tuple[float, int]:
    """Share of pictures whose own caption is the nearest in their group, and the group's size. A smaller last group is left
    out."""
    clip.eval()
    size = min(group, len(collate.ids))
    starts = range(0, len(collate.ids) - size + 1, size)
    batches = [{key: value.to(clip.device) for key, value in collate(range(s, s + size)).items()} for s in starts]
    best = [clip(**batch).logits_per_image.argmax(1).cpu() == torch.arange(size) for batch in batches]
    return torch.cat(best).float().mean().item(), size


SMALL = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.08,  # with 0.02, as for larger widths, attention is learnt hundreds of steps later
    "tie_word_embeddings": True,
}


def make_lm(tokenizer, max_length: int) -> LlamaForCausalLM:
    """A small, untrained decoder: four layers of width 128, SwiGLU, no biases."""
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": max(512, 2 * max_length)}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **size, **special_ids(tokenizer)))


def find_lm(name: str) -> tuple[Checkpoint, PreTrainedConfig]:
    checkpoint = Checkpoint("--lm", name, "give a folder (--lm DIR), or leave --lm out: a small one is trained")
    config = checkpoint.config("the language model")
    check_decoder(checkpoint.sketch("the language model", AutoModelForCausalLM, config))
    return checkpoint, config


def load_lm(checkpoint: Checkpoint, config: PreTrainedConfig) -> tuple[PreTrainedModel, object]:
    """A pretrained decoder and its tokenizer, to which `<image>` is added, and a padding token if it has none. UserError."""
    tokenizer = checkpoint.tokenizer(config, added=(EOS, PAD, IMAGE))
    lm = checkpoint.model("the language model", AutoModelForCausalLM, config, dtype=torch.float32)
    if tokenizer.eos_token_id is None:
        tokenizer.add_special_tokens({"eos_token": EOS})
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    if len(tokenizer) > lm.config.vocab_size:
        torch.manual_seed(0)  # the new rows are random
        lm.resize_token_embeddings(len(tokenizer))
    return lm, tokenizer


def check_decoder(lm: PreTrainedModel) -> None:
    """UserError for a language model that cannot be the one of a LLaVA with MoE layers."""
    layers, head = getattr(lm.base_model, "layers", None), lm.get_output_embeddings()
    if not layers or head is None:
        raise UserError(f"--lm: a {lm.config.model_type} is not a Llama-like decoder; use another model")
    try:
        moefication.decoder_ffn(layers[0])
    except ValueError as error:
        raise UserError(f"--lm: {error}") from None
    scaled = [name for name in ("final_logit_softcapping", "logits_scaling") if getattr(lm.config, name, None)]
    if head.bias is not None or scaled:
        raise UserError(f"--lm: its head has {(scaled or ['a bias'])[0]}, which a LLaVA does not support; use another model")


# ---- 3. LLaVA ----


def join(clip: CLIPModel, lm: PreTrainedModel, data: Data) -> LlavaForConditionalGeneration:
    """transformers' LLaVA from both, with a new two-layer projector on the features of CLIP's second to last layer, as in
    MoE-LLaVA."""
    image = {"image_token_index": data.image_id, "image_seq_length": data.image_tokens}
    parts = {"vision_config": clip.config.vision_config, "text_config": lm.config}
    model = LlavaForConditionalGeneration(LlavaConfig(**parts, **image, tie_word_embeddings=lm.config.tie_word_embeddings))
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.language_model.load_state_dict(lm.base_model.state_dict())
    model.lm_head.load_state_dict(lm.lm_head.state_dict())
    return model


def trainable(model: LlavaForConditionalGeneration) -> list[nn.Parameter]:
    """All parameters except those of CLIP, which stays frozen. Tied ones once."""
    frozen = {id(parameter) for parameter in model.model.vision_tower.parameters()}
    return [parameter for parameter in model.parameters() if id(parameter) not in frozen]


def split_matrices(model: PreTrainedModel, trained: Sequence[nn.Parameter]) -> tuple[list, list]:
    """The trained parameters in two lists: the matrices of linear layers, without the token tables, and the others."""
    tables = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)} - tables
    return [p for p in trained if id(p) in linear], [p for p in trained if id(p) not in linear]


Part = tuple[Checkpoint, PreTrainedConfig] | None  # a pretrained one, or None: it is trained


def find_parts(args) -> tuple[Part, Part]:
    """The CLIP and the language model of the flags, before any weights are fetched. UserError."""
    return find_clip(args.clip) if args.clip else None, find_lm(args.lm) if args.lm else None


def check_spec(args, clip: Part, lm: Part) -> moefication.MoESpec:
    """The MoE spec for the language model. UserError."""
    text = lm[1] if lm else LlamaConfig(**SMALL)
    vision = {"vision_config": clip[1].vision_config} if clip else {}
    return moefication.spec_of(LlavaConfig(text_config=text, **vision), "--lm", **spec_options(args))


def cluster_questions(model: PreTrainedModel, data: Data, num_clusters: int, seed: int) -> Tensor:
    """centres_CD of the training questions."""
    found = {tuple(id for id, asked in zip(one.input_ids, one.asked) if asked): None for one in data.encoded}
    table_VD = model.get_input_embeddings().weight.detach()
    return baselines.cluster_instructions(torch.stack([table_VD[list(ids)].mean(0) for ids in found]), num_clusters, seed)


@torch.no_grad()
def generate(model: PreTrainedModel, samples, batch: dict, tokenizer, max_new_tokens: int) -> Tensor:
    """new_BL: the model's greedy answers to a batch of prompts from `Collate`. `samples`: the model's Samples, or None."""
    batch = {key: value.to(model.device) for key, value in batch.items()}
    keep, asked = batch.pop("keep"), batch.pop("asked")
    if samples:
        samples.set(keep, **question_values(model, batch["input_ids"], asked))
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids_BL = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, **special)
    return ids_BL[:, batch["input_ids"].shape[1] :]


def ask(model: PreTrainedModel, tokenizer, card: "Card", images_N3SS: Tensor, question: str) -> str:
    """The answer to one question, about the picture if one is given."""
    question = question.replace(IMAGE, " ").strip()
    text = f"{IMAGE}\n{question}" if len(images_N3SS) else question
    data = InstructionSet(images_N3SS, [Instruction(((text, None),), 0 if len(images_N3SS) else None, "vqa")])
    encoded = encode([one.turns for one in data.instructions], tokenizer, card.image_tokens)
    packs = make_packs(data, encoded, tokenizer.convert_tokens_to_ids(IMAGE), 0, share=False)
    batch = Collate(data, packs, card.pixels, tokenizer.pad_token_id, prompts=True)([0])
    del batch["rows"]
    ids_BL = generate(model, baselines.samples_of(model), batch, tokenizer, max_new_tokens=64)
    return tokenizer.decode(ids_BL[0], skip_special_tokens=True).strip()


SHOWN = 8  # examples of a page, and of a card


def mixed_kinds(groups: Iterable[Sequence[Instruction]]) -> list[int]:
    """The place of one instruction in each group, such that all kinds are chosen about equally often."""
    seen, chosen = Counter(), []
    for group in groups:
        chosen.append(min(range(len(group)), key=lambda i: seen[group[i].kind]))
        seen[group[chosen[-1]].kind] += 1
    return chosen


def film_batch(model: PreTrainedModel, collate: Collate, rows: Sequence[int], tokenizer, side: int):
    """What a film needs of some packs: the batch, what a page shows of it, and the function that reads the answers. `side`:
    of a picture, in patches."""
    packs = [collate.packs[row] for row in rows]
    batch = {key: value.to(model.device) for key, value in collate(rows).items()}
    keep, asked, _ = (batch.pop(name) for name in ("keep", "asked", "rows"))
    if samples := baselines.samples_of(model):
        samples.set(keep, **question_values(model, batch["input_ids"], asked))
    shown, ends = show_packs(collate.data, packs, tokenizer, side, batch["input_ids"].shape[1])
    return batch, shown, partial(read_answers, labels=batch["labels"], ends=ends, tokenizer=tokenizer)


def show_packs(data: InstructionSet, packs: Sequence[Pack], tokenizer, side: int, length: int):
    """What a page shows of a batch of packs with rows of `length` tokens: of the first ones the picture and one conversation
    about it. And where each conversation begins and ends in its row."""
    shown, ends, image_id = Shown(), [], tokenizer.convert_tokens_to_ids(IMAGE)
    groups = [[data.instructions[row] for row in pack.rows] for pack in packs[:SHOWN]]
    for number, (pack, group, chosen) in enumerate(zip(packs, groups, mixed_kinds(groups))):
        one, prefix, rest = group[chosen], pack.prefix.input_ids, pack.rests[chosen]
        start = len(prefix) + sum(len(other.input_ids) for other in pack.rests[:chosen])
        ends.append((start, start + len(rest.input_ids)))
        fields, end = [], len(prefix)
        for is_answer, labels in groupby(rest.labels, key=lambda label: label != IGNORED):
            begin, end = end, end + len([*labels])
            fields.append(["answer", begin, end - 1] if is_answer else ["question", begin, end])  # without the <eos>
        place = iter(range(side * side))
        patches = [[*divmod(next(place), side)] if id == image_id else None for id in prefix]
        questions, answers = zip(*one.turns)
        more = {"fields": fields, "question": " ".join(questions).replace(IMAGE, "").strip()}
        if one.image is not None:
            more |= {"kind": "picture", "image": png_of(data.images_N3SS[one.image]), "grid": [side, side]}
        index = [number * length + n for n in (*range(len(prefix)), *range(*ends[-1]))]
        shown.add(tokenizer, prefix + rest.input_ids, index, " ".join(answers), patches, **more)
    return shown, ends


def png_of(image_3SS: Tensor) -> str:
    """A picture as a data URL."""
    buffer = io.BytesIO()
    Image.fromarray(image_3SS.permute(1, 2, 0).numpy()).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_of(url: str, size: int) -> Tensor:
    """The picture of `png_of`, uint8 (3, S, S). ValueError, or an error of Pillow, for anything else."""
    file = io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))
    with Image.open(file, formats=["PNG"]) as image:  # which has not read the pixels
        if (image.mode, image.size) != ("RGB", (size, size)):
            raise ValueError(f"a picture is {image.mode}, {image.size[0]} x {image.size[1]}, not RGB, {size} x {size}")
        return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)


def read_answers(out, labels: Tensor, ends: Sequence[tuple[int, int]], tokenizer) -> list[str]:
    """The most likely token at each place of the shown answers, given those before it."""
    found = []
    for row, (start, end) in enumerate(ends):
        asked = (labels[row, start:end] != IGNORED).nonzero().flatten() + start
        ids = out.logits[row, asked - 1].argmax(-1).tolist()
        found.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return found


# ---- 4. Saved models ----

CARD = "lvlm.json"


def save(model: PreTrainedModel, folder: Path, data: Data) -> None:
    """Saves weights and tokenizer in transformers' format, and a card with the format of pictures."""
    model.save_pretrained(folder, save_original_format=False)  # under the model's own parameter names
    data.tokenizer.save_pretrained(folder)
    write_json(folder / CARD, asdict(Card(*data.pixels, data.image_tokens, choose_examples(data.test))))


def choose_examples(data: InstructionSet) -> list[dict]:
    """One instruction for each of a few pictures, as a card keeps them."""
    groups = [[own for own in data.instructions if own.image == row] for row in evenly(len(data.images_N3SS), SHOWN)]
    chosen = [group[i] for group, i in zip(groups, mixed_kinds(groups))]
    return [{"turns": [*map(list, o.turns)], "kind": o.kind, "image": png_of(data.images_N3SS[o.image])} for o in chosen]


@dataclass(frozen=True)
class Card:
    """The format of pictures that a saved model expects, and test examples to show it on. Bad values raise ValueError."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_tokens: int
    examples: list[dict] = field(default_factory=list)  # turns, kind and image, a data URL; none in older cards

    def __post_init__(self):
        whole = all(type(value) is int and 0 < value < 10_000 for value in (self.size, self.image_tokens))
        triples = all(len(value) == 3 and all(type(v) is float for v in value) for value in (self.mean, self.std))
        if not (whole and triples and math.isfinite(sum(self.mean + self.std)) and min(self.std) > 1e-6):
            raise ValueError(f"invalid values: {asdict(self)}")
        if not fits(self.examples, [{"turns": [[str]], "kind": str, "image": str}]):
            raise ValueError("invalid examples")
        for one in self.examples:
            questions = [question for question, _ in one["turns"]]  # ValueError for other than two
            if sum(question.count(IMAGE) for question in questions) != 1:
                raise ValueError(f"an example has not one {IMAGE}: {questions}")

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.size, tuple(self.mean), tuple(self.std))

    def instructions(self) -> InstructionSet:
        """The examples. ValueError, or an error of Pillow, for a picture of another format."""
        images_N3SS = torch.stack([picture_of(one["image"], self.size) for one in self.examples])
        turns = [tuple(map(tuple, one["turns"])) for one in self.examples]
        return InstructionSet(images_N3SS, [Instruction(own, i, self.examples[i]["kind"]) for i, own in enumerate(turns)])


def load(saved: Checkpoint) -> tuple[PreTrainedModel, object, Card]:
    """Model (moefied or dense, in eval mode), tokenizer and card, read from this folder only. UserError if it is damaged."""
    saved.require("config.json", "tokenizer.json")
    card = saved.read(CARD, Card)
    model = moefication.load_either(saved, LlavaForConditionalGeneration)
    vision = model.config.vision_config
    if (card.size, card.image_tokens) != (size := (vision.image_size, count_patches(vision))):
        saved.refuse(f"{CARD} has pictures of {card.size} pixels and {card.image_tokens} tokens, the model {size}")
    return model, saved.tokenizer(model.config), card


def film_of_model(folder: Path, device="cpu") -> tuple[dict, dict[str, Tensor]]:
    """A film of one moment: a saved model on its card's examples. UserError for one without MoE layers or examples."""
    saved = Checkpoint("--inspect", folder, again="train again")
    model, tokenizer, card = load(saved)
    if not any(isinstance(module, MoELayer) for module in model.modules()):
        raise UserError(f"--inspect {folder} is a dense model without MoE layers: name another")
    if not card.examples:
        saved.refuse(f"{CARD} has no examples, as an older version wrote it")
    data = saved.guard(f"{CARD} of", card.instructions)
    encoded = encode([one.turns for one in data.instructions], tokenizer, card.image_tokens)
    packs = make_packs(data, encoded, tokenizer.convert_tokens_to_ids(IMAGE), 0, share=False)
    collate, side = Collate(data, packs, card.pixels, tokenizer.pad_token_id), math.isqrt(card.image_tokens)
    model = model.to(device)
    return look_at(model, *film_batch(model, collate, range(len(packs)), tokenizer, side))
