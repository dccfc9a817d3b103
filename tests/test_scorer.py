"""The scorer is what teacher forcing says, one label at a time, and what generate() says where that names a label."""

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import normalizers

from animals.checkpoint.load import load_model, load_processor
from animals.command import UserError
from animals.pictures.read import list_pictures, load_picture
from animals.scoring.scorer import Scorer
from animals.training.batches import PictureCollator
from config import CHAT_TEMPLATE, Config


@pytest.fixture(scope="module")
def trained(demo):
    processor = load_processor(str(demo.checkpoint))
    return processor, load_model(str(demo.checkpoint), "float32")


@pytest.fixture(scope="module")
def pictures(demo):
    """Mixed shapes in one batch: the demo's own, and stretched ones that take other grids."""
    paths = list_pictures(str(demo.input / "validation_data"))[::17][:12]
    opened = [load_picture(path) for path in paths]
    return opened + [opened[0].resize((400, 60)), opened[1].resize((60, 400)), opened[2].resize((300, 300))]


def conversation(config, picture, answer=None):
    messages = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": config.question}]}
    ]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def encode(processor, messages, **kwargs):
    return processor.apply_chat_template(
        messages,
        chat_template=CHAT_TEMPLATE,
        tokenize=True,
        return_dict=True,
        processor_kwargs={"add_special_tokens": False, "return_tensors": "pt", **kwargs},
    )


def invented(n):
    """A table of n folders whose names nobody trained on, of one token and of many."""
    parts = ("zor", "bli", "quax", "me", "tho")
    return {name: name for name in ("_".join((parts[i % 5], parts[i // 5 % 5], str(i))) for i in range(n))}


@pytest.mark.parametrize(
    "table", [None, invented(3), pytest.param(invented(120), marks=pytest.mark.slow)], ids=["ten", "3", "120"]
)
def test_equals_teacher_forcing_one_label_at_a_time(trained, pictures, table, capfd):
    processor, model = trained
    config = Config(folder_to_label=table)
    pictures = pictures if table is None else pictures[-2:]
    scorer = Scorer(processor, config)
    said = capfd.readouterr().err
    assert (f"the question takes {len(scorer._token_ids()) - 1} tokens" in said) == (len(config.labels) == 120)
    ours, text = scorer.score(model, scorer.collate(pictures)), []
    for picture, row in zip(pictures, ours, strict=True):
        prompt = encode(processor, conversation(config, picture))["input_ids"].shape[1]
        for label, score in zip(config.labels, row.tolist(), strict=True):
            inputs = encode(processor, conversation(config, picture, label))
            with torch.inference_mode():
                log_p = model(**inputs).logits.float().log_softmax(-1)[0]
            ids = inputs["input_ids"][0]
            alone = sum(log_p[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
            assert abs(alone - score) < 1e-4, (label, alone, score)
            text.append((ids != processor.image_token_id).sum().item())
    assert scorer.text_tokens == max(text)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("way", ["bfloat16", "autocast", "adapter"])
def test_a_tie_in_bfloat16_is_broken_as_float64_does(demo, pictures, ties, way):
    """Two heads: as trained; and one where `dog`, the second label, is better than `cat` by less than bfloat16 shows.

    way: weights in bfloat16; float32 weights under autocast, as in training; an adapter, with layers in the head too.
    """
    model = load_model(str(demo.checkpoint), "float32" if way == "autocast" else "bfloat16")
    scorer = Scorer(load_processor(str(demo.checkpoint)), Config(folder_to_label={"cat": "cat", "dog": "dog"}))
    batch, n = scorer.collate(pictures[:1]), len(scorer.fed_ids) + 1
    inputs = {**batch, "pixel_values": batch["pixel_values"].to(model.dtype)}
    (cat, _), (dog, _) = scorer.answers
    head, words = model.lm_head.weight.data, model.get_input_embeddings().weight.data
    head[:] = head.bfloat16()
    words[dog] = words[cat]  # so that </s> follows both with the same probability
    low = torch.autocast("cpu", torch.bfloat16) if way == "autocast" else contextlib.nullcontext()
    with torch.no_grad(), low:
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, -n:]
        assert hidden.shape[:2] == (1, n)
        if ties:
            better = torch.nextafter(head[cat].bfloat16(), hidden[0, 0].bfloat16() * torch.inf).to(head)
            gain = hidden[0, 0].double() * (better - head[cat]).double()  # of one element of the row by one step
            place = gain.argsort()[len(gain) // 2]
            head[dog] = head[cat]
            head[dog, place] = better[place]
        exact = (hidden.double() @ head.double().T).log_softmax(-1)[:, scorer.target_row, scorer.target_ids]
        exact = torch.zeros(1, 2).double().index_add_(1, scorer.target_label, exact)
        rounded = model(**inputs, logits_to_keep=n, use_cache=False).logits
        assert rounded.dtype == torch.bfloat16 and (rounded[0, 0, cat] == rounded[0, 0, dog]) == ties
        if way == "adapter":
            model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "lm_head"], r=2))
        found = scorer.score(model, batch)
        assert torch.allclose(found.double(), exact, rtol=0, atol=1e-5)
        assert found.argmax() == exact.argmax() and (exact.argmax() == 1 or not ties)
        assert model(**inputs, logits_to_keep=n, use_cache=False).logits.dtype == torch.bfloat16, "as it was before"


def test_argmax_is_what_generate_says(trained, pictures):
    processor, model = trained
    config = Config()
    scorer = Scorer(processor, config)
    best = scorer.score(model, scorer.collate(pictures)).argmax(1).tolist()
    agreed = 0
    for picture, ours in zip(pictures, best, strict=True):
        inputs = encode(processor, conversation(config, picture))
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, pad_token_id=processor.tokenizer.pad_token_id
        )
        said = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        if said in config.labels:
            agreed += 1
            assert config.labels[ours] == said
    assert agreed >= len(pictures) // 2, "a trained model answers with labels"


def test_one_bos_and_only_the_answer_learned(trained, demo):
    processor, _ = trained
    tokenizer, config = processor.tokenizer, Config()
    path = list_pictures(str(demo.input / "train_data"))[0]
    user = [{"type": "image", "text": None}, {"type": "text", "text": config.question}]
    for label in config.labels:
        messages = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": label}]},
        ]
        batch = PictureCollator(processor, assistant_only_loss=True)([{"images": [path], "messages": messages}])
        learned = batch["labels"][0][batch["labels"][0] != -100]
        assert tokenizer.decode(learned) == f"{label}</s>"
        assert (batch["input_ids"] == tokenizer.bos_token_id).sum() == 1
        scored = Scorer(processor, config).collate([load_picture(path)])
        fed = len(Scorer(processor, config).fed_ids)
        prompt = scored["input_ids"][0, :-fed]
        assert torch.equal(prompt, batch["input_ids"][0, : len(prompt)])  # one prompt, in training and in scoring
        assert torch.equal(scored["pixel_values"], batch["pixel_values"])


def test_training_pads_on_the_right(trained, demo):
    processor, _ = trained
    rows = []
    for path, label in zip(list_pictures(str(demo.input / "train_data"))[:2], ("cat", "squirrel"), strict=True):
        content = [{"type": "image", "text": None}, {"type": "text", "text": Config().question}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": f"{label} " * (len(rows) + 1)}]}
        rows.append({"images": [path], "messages": [{"role": "user", "content": content}, answer]})
    mask = PictureCollator(processor, assistant_only_loss=True)(rows)["attention_mask"]
    assert mask.sum(1).min() < mask.shape[1], "the rows differ in length"
    assert (mask.diff(dim=1) <= 0).all()


def test_labels_with_the_same_tokens_are_refused(demo):
    processor = load_processor(str(demo.checkpoint))
    backend = processor.tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    with pytest.raises(UserError, match="same answer tokens"):
        Scorer(processor, Config(folder_to_label={"a": "cat", "b": "Cat"}))
