"""The tiny model's tokenizer: characters, with GLM-4.7's special tokens and chat template."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

BOX = "\\boxed{"
"""One ordinary token, so that an answer takes few steps."""

CHARACTERS = ("\n", *(chr(code) for code in range(ord(" "), ord("~") + 1)))

PAD_TOKEN = "<|endoftext|>"
EOS_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
"""As GLM-4.7's: a turn ends where the next speaker's begins."""

CONTROL_TOKENS = (
    PAD_TOKEN,
    *("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink"),
)
"""Left out of decoded text where special tokens are skipped."""

VISIBLE_TOKENS = (
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
    *("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
"""Never left out of decoded text: a grader must see where the thinking ends."""

UNKNOWN_TOKEN = "<|unknown|>"

VOCAB_SIZE = 128
"""A multiple of 64. Unused tokens fill it up, so that whatever the model samples can be decoded."""

CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>
{%- if '</think>' not in message.content -%}</think>{%- endif -%}
{{ message.content }}
{%- elif message.role in ('system', 'user', 'observation') -%}
<|{{ message.role }}|>{{ message.content }}
{%- else -%}
{{ raise_exception('unknown role ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- if enable_thinking is defined and not enable_thinking -%}</think>{%- else -%}<think>{%- endif -%}
{%- endif -%}
"""


def build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB_SIZE tokens over printable ASCII and newline: `decode(encode(text)) == text`, and any other
    character becomes UNKNOWN_TOKEN. `save_pretrained` writes what AutoTokenizer reads."""
    ordinary = [*CHARACTERS, BOX]
    added = [*CONTROL_TOKENS, *VISIBLE_TOKENS, UNKNOWN_TOKEN]
    added += [f"<|unused_{number}|>" for number in range(VOCAB_SIZE - len(ordinary) - len(added))]
    vocabulary = {token: index for index, token in enumerate([*ordinary, *added])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(t, special=t not in VISIBLE_TOKENS, normalized=False) for t in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
