"""What a file is made of, without its values: nested keys, types, and the dtype and shape of tensors."""

import torch


def shape(value):
    """Describe a nested value; the entries of a list, and of a dict with whole numbers as keys, are described as one.

    Where they differ, a key that some lack gets a question mark, and several descriptions an 'or'.
    """
    if isinstance(value, dict) and value and all(isinstance(key, int) for key in value):
        return {"each": _common([shape(item) for item in value.values()])}
    if isinstance(value, dict):
        return {str(key): shape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_common([shape(item) for item in value])] if value else []
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__


def _common(found):
    if all(isinstance(item, dict) for item in found):
        keys = dict.fromkeys(key.removesuffix("?") for item in found for key in item)
        return {
            key if all(key in item for item in found) else f"{key}?": _common(
                [item[name] for item in found for name in (key, f"{key}?") if name in item]
            )
            for key in keys
        }
    if all(isinstance(item, list) for item in found):
        inner = [item[0] for item in found if item]
        return [_common(inner)] if inner else []
    names = {item if isinstance(item, str) else type(item).__name__ for item in found}
    if len(names) > 1 and all("[" in name for name in names):  # tensors of one kind and many sizes
        names = {f"{name.split('[')[0]}[...]" for name in names}
    return " or ".join(sorted(names))
