"""A run's `Template` as the chat template of a Hugging Face folder: the same text, character by character."""

from collections.abc import Sequence

from hetjax.data import ItemSpec, Template

FILE = "chat_template.jinja"


def write(template: Template, items: Sequence[ItemSpec]) -> str:
    """The template in jinja. A part such as {"type": "image"} of a question becomes its placeholder and a line's end,
    which is what `hetjax.generate` puts in front of a question for a file without a placeholder."""
    kinds = "".join(
        f"{{% elif part['type'] == {_quoted(item.field)} %}}{{{{ {_quoted(item.placeholder + chr(10))} }}}}"
        for item in items
    )
    return (
        "{% macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}" + kinds + "{% else %}"
        "{{ raise_exception('the model was not trained with parts of type ' + part['type']) }}{% endif %}"
        "{% endfor %}{% endif %}{% endmacro %}"
        f"{{{{ {_quoted(template.start)} }}}}"
        "{% for message in messages %}{% if message['role'] == 'system' and loop.first %}"
        f"{{{{ {_quoted(template.system_prefix)} }}}}{{{{ shown(message['content']) }}}}"
        f"{{{{ {_quoted(template.system_suffix)} }}}}"
        "{% elif message['role'] == 'user' %}"
        "{% if not loop.first and messages[loop.index0 - 1]['role'] != 'system' %}"
        f"{{{{ {_quoted(template.answer_suffix)} }}}}{{% endif %}}"
        f"{{{{ {_quoted(template.human_prefix)} }}}}{{{{ shown(message['content']) }}}}"
        f"{{{{ {_quoted(template.human_suffix)} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ shown(message['content']) }}}}{{{{ {_quoted(template.end_token)} }}}}"
        "{% else %}{{ raise_exception('the model was trained with user and assistant, system in front') }}"
        "{% endif %}{% endfor %}"
    )


def _quoted(text: str) -> str:
    """`text` as a literal of jinja, which reads Python's escapes."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
