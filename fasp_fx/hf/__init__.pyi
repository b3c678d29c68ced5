from ._config import (
    PrunedConfig as PrunedConfig,  # Configuration of PrunedForCausalLM and PrunedForSeq2SeqLM
    check_layers as check_layers,  # Refuse a configuration that says a number of layers, or a size, that no model has
)
from ._evaluation import (
    Judged as Judged,  # A language model that keeps how well it predicts each text that it is called with
    perplexity as perplexity,  # Mean cross-entropy over the length - 1 predictions of each chunk, exponentiated
    predictions as predictions,  # What a model in evaluation mode predicts of a text; arguments and errors as for perplexity
)
from ._folder import (
    KIND as KIND,  # the kind of a save that holds programs
    PLAIN as PLAIN,  # the kind of a save in a format of others
    load_offloaded as load_offloaded,  # Load a model whose weights lie in files, and never all in memory; otherwise as from_pretrained does
    loading_of as loading_of,  # The code that loads a model of whatever format from a folder or a hub
    refuse_incomplete as refuse_incomplete,  # Refuse a model with weights made up, or with fewer layers than its files
)
from ._model import (
    PrunedForCausalLM as PrunedForCausalLM,  # A pruned decoder that generates as its original does
    PrunedForSeq2SeqLM as PrunedForSeq2SeqLM,  # A pruned encoder-decoder that generates as its original does
    PrunedModel as PrunedModel,  # A model whose forward is a captured and pruned program with a cache; made by fasp_fx.hf.prune or from_pretrained
)
from ._own_text import (
    write_texts as write_texts,  # Have a language model write text: drawn from what it predicts, past the end of a document, too
)
from ._prune import (
    CapturedModel as CapturedModel,  # A generating model as the programs that generation needs, over its own weights, for several prunings
    Pruned as Pruned,  # What fasp_fx.hf.prune returns
    analyze as analyze,  # The coupled groups of a generating model, as fasp_fx.analyze
    apply as apply,  # Carry out a plan on the generating model it was made for, as fasp_fx.apply
    capture as capture,  # Capture a generating model of transformers once, for several analyses and prunings
    convert as convert,  # Put a pruned model into another format, which has to be able to hold what was pruned
    measure as measure,  # Predict what each coupled group of a generating model costs, as fasp_fx.measure; arguments as for prune
    prune as prune,  # Make a generating model of transformers smaller, so that it still generates; the caller's model is not touched
    read_pruned as read_pruned,  # A pruned model as fasp_fx.hf.prune returned it, from a folder, with its tokenizer if there is one
    sweep as sweep,  # Predict what removing more and more of a generating model would cost, as fasp_fx.sweep
)
from ._registry import (
    FORMATS as FORMATS,  # every format of the files, by its name
    class_in as class_in,  # The class that the configuration of a folder names, of transformers or of this library
)
from ._stages import (
    pruned_already as pruned_already,  # What is said of a model that is the result of a pruning
)

__all__ = [
    "CapturedModel",
    "Pruned",
    "PrunedConfig",
    "PrunedForCausalLM",
    "PrunedForSeq2SeqLM",
    "analyze",
    "apply",
    "capture",
    "convert",
    "load_offloaded",
    "measure",
    "perplexity",
    "prune",
    "sweep",
    "write_texts",
]
