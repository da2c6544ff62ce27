"""Make Triton's interpreter do what it does for every operation and every call once: the same results in less time.

It looks through all members of ``triton.language`` for those that it replaces, in every call of a device function; once
a launch is enough. It computes whether integers overflow, for an assertion that only its debug mode makes. It makes a
table of NumPy's types each time that it looks a type up. It checks and describes a type of blocks, and the shape of a
tensor, anew for each operation.
"""

import dataclasses
import inspect
import math

NAMES = ("_LangPatchScope", "_patch_attr", "_patch_builtin", "_patch_lang", "_get_np_dtype", "GridExecutor")


def quicken():
    """Change the interpreter, unless its functions have other names in this version of Triton."""
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    if not all(hasattr(interpreter, name) for name in NAMES) or options.debug:
        return
    is_builtin, launch = interpreter.tl.core.is_builtin, interpreter.GridExecutor.__call__
    patch_lang, np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    members, types, patched = {}, {}, set()

    def patch_builtin(package, builder, scope):
        if package not in members:
            members[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        for name in members[package]:
            if is_builtin(member := getattr(package, name)):
                interpreter._patch_attr(package, name, member, builder, scope)

    def patch_once(function):
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch_lang(function)

    def launched(self, *args, **options):
        patched.clear()
        return launch(self, *args, **options)

    def kept_dtype(kind):
        if kind.scalar.is_ptr():
            return np_dtype(kind)
        if kind.scalar not in types:
            types[kind.scalar] = np_dtype(kind)
        return types[kind.scalar]

    interpreter._patch_builtin, interpreter._patch_lang = patch_builtin, patch_once
    interpreter._get_np_dtype = kept_dtype
    interpreter.GridExecutor.__call__ = launched
    _keep_block_types(interpreter.tl.core)
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _keep_block_types(core):
    """Make the type of blocks of numbers of a shape once, and the parts of a tensor that follow from its type."""
    make_type, types, parts = core.block_type.__init__, {}, {}

    def kept_type(cls, element_ty=None, shape=()):
        if cls is not core.block_type or type(element_ty) is not core.dtype:
            return object.__new__(cls)
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in types:
            types[key] = kind = object.__new__(cls)
            make_type(kind, element_ty, shape)
        return types[key]

    def make_once(self, element_ty, shape):
        if "numel" not in vars(self):
            make_type(self, element_ty, shape)

    def make_tensor(self, handle, type):
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in parts:
            parts[sizes] = core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = parts[sizes]

    core.block_type.__new__, core.block_type.__init__, core.tensor.__init__ = kept_type, make_once, make_tensor
