from ._folder import (
    MANIFEST as MANIFEST,  # the file of a save that lists the others
    claim as claim,  # Take a folder for a run, or go on with the run that it is of
    is_save as is_save,  # Whether a folder holds a save of one of these kinds and nothing besides
    new_save as new_save,  # Give a folder to fill, which takes the name path, with a manifest, when the block ends
    parsing as parsing,  # Turn whatever a reader of foreign data trips over into an error that names the file; the cause stays with it
    read_json as read_json,  # The JSON object in a file
    read_manifest as read_manifest,  # What a folder holds a save of, and which files
    read_state as read_state,  # What JSON in a file of such a folder holds, as a dataclass
    read_text as read_text,  # The text of a file
    refuse_other as refuse_other,  # Refuse a folder that holds something else than the state of a run, and what is no folder
    verify as verify,  # Hold files of a save against its manifest
    write_json as write_json,  # Write data as JSON
    write_manifest as write_manifest,  # List files of a folder, or every one; all get the permissions that new files have here
)
from ._graph_json import (
    check_weights as check_weights,  # Refuse weights that are not what the graph takes them for, as after module.half()
    program_from_json as program_from_json,  # The program over the given tensors
    program_to_json as program_to_json,  # The graph, its signature, ranges and guards, and the shapes of the example inputs; no tensor
)
from ._values import (
    read_tensors as read_tensors,  # The tensors of one file, on device or where they were; tied names share one object
    signature_from_json as signature_from_json,  # The signature that signature_to_json wrote
    signature_to_json as signature_to_json,  # Names, kinds and defaults of the parameters, and what was captured
    write_tensors as write_tensors,  # Write tensors to one file
)
