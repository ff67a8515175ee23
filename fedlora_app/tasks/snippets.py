"""Python that uses an exported model, for its card; tests run every piece."""

PIPELINE = """\
from transformers import pipeline

model = pipeline("{task}", model=FOLDER)
print(model({item}))
"""

CLASSIFIER = """\
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

model = AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels={count}).eval()
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
logits = model(**tokenizer("…", truncation=True, return_tensors="pt")).logits
# in the order of labels.json
"""

IMAGES = """\
import json
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

base = json.load(open(FOLDER + "/adapter_config.json"))["base_model_name_or_path"]
model = AutoModelForImageClassification.from_pretrained(
    base, num_labels={count}, ignore_mismatched_sizes=True
)
model = PeftModel.from_pretrained(model, FOLDER).eval()
processor = AutoImageProcessor.from_pretrained(FOLDER)
pixels = processor(Image.open("photo.png").convert("RGB"), return_tensors="pt")
logits = model(**pixels).logits  # in the order of labels.json
"""

ENCODER = """\
encoder = AutoModel.from_pretrained(FOLDER)
"""

ENCODER_ADAPTER = """\
base = json.load(open(FOLDER + "/adapter_config.json"))["base_model_name_or_path"]
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), FOLDER)
"""

MEAN_POOL = """\
{imports}from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
{encoder}head = load_file(FOLDER + "/2_Dense/model.safetensors")
tokens = tokenizer(["…"], padding=True, truncation=True, return_tensors="pt")
mask = tokens["attention_mask"].unsqueeze(-1)
states = encoder.eval()(**tokens).last_hidden_state * mask
logits = states.sum(1) / mask.sum(1) @ head["linear.weight"].T + head["linear.bias"]
# in the order of labels.json; the folder has the layout of sentence-transformers, too
"""

WRITER = """\
{imports}from transformers import AutoTokenizer{more}

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = {auto}.from_pretrained(FOLDER).eval()
{prompt}
written = model.generate(**tokens, max_new_tokens=128)
print(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
"""

CHAT = """\
tokens = tokenizer.apply_chat_template(
    [{"role": "user", "content": "…"}],
    add_generation_prompt=True, return_tensors="pt", return_dict=True,
)"""

PLAIN = """\
tokens = tokenizer("### User:\\n…\\n\\n### Assistant:\\n", return_tensors="pt")"""


def mean_pool(merged: bool) -> str:
    """Return how an encoder with the mean of its states and a dense layer is used."""
    imports = "" if merged else "import json\nfrom peft import PeftModel\n"
    return MEAN_POOL.format(imports=imports, encoder=ENCODER if merged else ENCODER_ADAPTER)


def writer(merged: bool, chat: bool) -> str:
    """Return how a language model is asked, in its chat template or the plain one."""
    return WRITER.format(
        imports="" if merged else "from peft import AutoPeftModelForCausalLM\n",
        more=", AutoModelForCausalLM" if merged else "",
        auto="AutoModelForCausalLM" if merged else "AutoPeftModelForCausalLM",
        prompt=CHAT if chat else PLAIN,
    )
