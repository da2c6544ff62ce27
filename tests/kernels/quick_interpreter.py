"""Make Triton's interpreter do what it does for every operation and every call once: the same results in less time.

It looks through all members of ``triton.language`` for those that it replaces, in every call of a device function; once
a launch is enough. It computes whether integers overflow, for an assertion that only its debug mode makes. It makes a
table of NumPy's types each time that it looks a type up.
"""

import dataclasses
import inspect

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
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
