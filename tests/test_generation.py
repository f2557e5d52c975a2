"""Generation with the installed transformers: what each step reads, and that the state is where it must be."""

import pytest
import torch
from helpers import DESIGNS
from transformers import LogitsProcessorList, UnbatchedClassifierFreeGuidanceLogitsProcessor, pipeline

from spikegpt_lora import SpikeGPTState, embedded_checkpoint

GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(params=DESIGNS)
def design(request):
    return request.param


def left_padded(ids, lengths):
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - torch.tensor(lengths)[:, None]
    return ids * mask, mask.long()


@pytest.fixture
def read(lm):
    """How many tokens of each row every step read, as it happens."""
    steps = []
    lm.spikegpt.emb_spike.register_forward_pre_hook(lambda module, args: steps.append(args[0].shape[1]))
    return steps


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_each_step_reads_one_token(lm, ids, read, settings):
    torch.manual_seed(0)
    lm.generate(ids, **GREEDY | settings, max_new_tokens=5)
    assert read == [9, 1, 1, 1, 1]


def test_each_step_from_embeddings_reads_one_token(lm, ids, read):
    lm.generate(inputs_embeds=lm.get_input_embeddings()(ids), **GREEDY, max_new_tokens=4)
    assert read == [9, 1, 1, 1]


def test_each_step_after_a_state_reads_one_token(lm, ids, read):
    lm.generate(ids[:, 6:], state=lm(ids[:, :6], use_cache=True).state, **GREEDY, max_new_tokens=4)
    assert read == [6, 3, 1, 1, 1]  # the first is the call that made the state


def test_without_the_cache_every_step_reads_everything(lm, ids, read):
    lm.generate(ids, **GREEDY, max_new_tokens=3, use_cache=False)
    assert read == [9, 10, 11]


def test_padded_embeddings_write_what_their_ids_write(lm, ids):
    prompt, mask = left_padded(ids, [9, 5, 1, 7])
    settings = GREEDY | {"max_new_tokens": 6, "attention_mask": mask}
    embeds = lm.get_input_embeddings()(prompt)
    assert torch.equal(lm.generate(inputs_embeds=embeds, **settings), lm.generate(prompt, **settings)[:, 9:])


def test_the_result_carries_the_state_and_goes_on_from_it(lm, ids):
    prompt, mask = left_padded(ids, [9, 5, 1, 7])
    settings = GREEDY | {"max_new_tokens": 4, "return_dict_in_generate": True}
    begun = lm.generate(prompt, attention_mask=mask, **settings)
    assert isinstance(begun.state, SpikeGPTState)
    rest = lm.generate(begun.sequences[:, -1:], state=begun.state, **settings)
    whole = lm.generate(prompt, attention_mask=mask, **settings | {"max_new_tokens": 8})
    assert torch.equal(rest.sequences[:, 1:], whole.sequences[:, -4:])


def test_a_beam_search_returns_no_state(lm, ids):
    result = lm.generate(ids, **GREEDY, num_beams=3, max_new_tokens=4, return_dict_in_generate=True)
    assert result.state is None


@pytest.mark.parametrize("negative", [None, [3, 14, 15]], ids=["last token", "negative prompt"])
def test_guidance_with_the_state_equals_guidance_without(lm, ids, negative):
    extra = {} if negative is None else {"negative_prompt_ids": torch.tensor([negative]).expand(4, -1)}
    settings = GREEDY | {"max_new_tokens": 6, "guidance_scale": 1.5} | extra
    guided = lm.generate(ids, **settings)
    assert torch.equal(guided, lm.generate(ids, use_cache=False, **settings))
    assert not torch.equal(guided, lm.generate(ids, **GREEDY, max_new_tokens=6))


def test_guidance_reads_one_token_a_step_too(lm, ids, read):
    guidance = UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, lm, unconditional_ids=ids[:, :3])
    lm.generate(ids, **GREEDY, max_new_tokens=3, logits_processor=LogitsProcessorList([guidance]))
    assert read == [9, 3, 1, 1, 1, 1]


def test_attention_matrices_are_refused_by_name(lm, ids):
    with pytest.raises(ValueError, match="output_attentions must be False: SpikeGPT has no attention"):
        lm.generate(ids, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_the_pipeline_parts_the_prompt_from_what_it_writes():
    write = pipeline("text-generation", model=embedded_checkpoint())
    text = write("this film", do_sample=False, max_new_tokens=5)[0]["generated_text"]
    assert text.startswith("this film ") and text.split()[2].isalpha()
