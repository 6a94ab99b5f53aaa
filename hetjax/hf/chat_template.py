"""A run's template as the chat template of a Hugging Face folder: the same text, character by character."""

import datetime
from collections.abc import Sequence

from hetjax.data import ChatTemplate, ItemSpec, Template, jinja

FILE = "chat_template.jinja"


def kept(template: ChatTemplate, items: Sequence[ItemSpec]) -> str:
    """The template as it wrote in the run, with the run's date as today.

    Where it writes no pictures or clips itself, parts of messages become texts before it, as in `write`."""
    lacking = [item for item in items if item.field not in template.parts]
    flat = (
        f"{_shown(lacking)}{{%- set flat = namespace(talk=[]) -%}}{{%- for m in messages -%}}{{%- set said -%}}"
        "{{ shown(m['content']) }}{%- endset -%}{%- set flat.talk = flat.talk + [dict(m, content=said)] -%}"
        "{%- endfor -%}{%- set messages = flat.talk -%}"
    )
    return (flat if lacking else "") + _dated(template)


def _dated(template: ChatTemplate) -> str:
    formats = jinja.date_formats(template.text)
    if not formats or template.date is None:
        return template.text
    day = datetime.date.fromisoformat(template.date)
    known = ", ".join(f"{_quoted(form)}: {_quoted(day.strftime(form))}" for form in formats)
    return f"{{%- macro strftime_now(format) -%}}{{{{ {{{known}}}[format] }}}}{{%- endmacro -%}}{template.text}"


def write(template: Template, items: Sequence[ItemSpec], joint: str = "") -> str:
    """The template in jinja, with `joint` between a prompt and its answer.

    A part such as {"type": "image"} of a question becomes its placeholder and a line's end, which is what
    `hetjax.generate` puts in front of a question for a file without a placeholder."""
    return (
        f"{_shown(items)}{{{{ {_quoted(template.start)} }}}}"
        "{% for message in messages %}{% if message['role'] == 'system' and loop.first %}"
        f"{{{{ {_quoted(template.system_prefix)} }}}}{{{{ shown(message['content']) }}}}"
        f"{{{{ {_quoted(template.system_suffix)} }}}}"
        "{% elif message['role'] == 'user' %}"
        "{% if not loop.first and messages[loop.index0 - 1]['role'] != 'system' %}"
        f"{{{{ {_quoted(template.answer_suffix)} }}}}{{% endif %}}"
        f"{{{{ {_quoted(template.human_prefix)} }}}}{{{{ shown(message['content']) }}}}"
        f"{{{{ {_quoted(template.human_suffix + joint)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ shown(message['content']) }}}}{{{{ {_quoted(template.end_token)} }}}}"
        "{% else %}{{ raise_exception('the model was trained with user and assistant, system in front') }}"
        "{% endif %}{% endfor %}"
    )


def _shown(items: Sequence[ItemSpec]) -> str:
    """A macro that writes a message's content, a text or parts."""
    kinds = "".join(
        f"{{% elif part['type'] == {_quoted(item.field)} %}}{{{{ {_quoted(item.placeholder + chr(10))} }}}}"
        for item in items
    )
    return (
        "{% macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}" + kinds + "{% else %}"
        "{{ raise_exception('the model was not trained with parts of type ' + part['type']) }}{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}"
    )


def _quoted(text: str) -> str:
    """`text` as a literal of jinja, which reads Python's escapes."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
