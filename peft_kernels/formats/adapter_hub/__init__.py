"""adapter-hub's folders: bottleneck and invertible adapters, fusions and heads of `adapters`.

An adapter is ``adapter_config.json`` with ``adapter.safetensors`` or ``pytorch_adapter.bin``, a
fusion ``adapter_fusion_config.json`` with ``model_adapter_fusion.safetensors`` or
``pytorch_model_adapter_fusion.bin``. The config file tells the host (model_type, hidden_size), the
name and, under ``config``, the method. Keys begin with the path of a sublayer in the base model:

    BERT's family     encoder.layer.N[.attention].output.adapters.<name>.<part>
    Llama, Mistral    layers.N.{attention,output}_adapters.adapters.<name>.<part>
    a fusion's        <as above>.adapter_fusion_layer.<name,name,...>.{query,key,value}.<weight>
    invertible        invertible_adapters.<name>.{F,G}.{0,2}.<weight or bias>

BERT's family is bert, roberta, xlm-roberta, electra and deberta-v2. The keys have ``bert.`` or the
like before them where a model with a head was saved. That prefix is written
always, since `adapters` loads such a file into every model of the family; without it, a fusion
isn't found by a model with a head.
"""

from peft_kernels.formats.adapter_hub.load import load_adapter, load_fusion, remove_adapter
from peft_kernels.formats.adapter_hub.save import save_adapter, save_fusion

__all__ = ["load_adapter", "load_fusion", "remove_adapter", "save_adapter", "save_fusion"]
