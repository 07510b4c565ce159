"""A preprocessed shader as C++, and the C++ that binds its kernels' arguments."""

from metal import source


def as_cpp(text: str) -> str:
    """The shader as C++: attributes taken out, threadgroup variables as references to memory of the threadgroup."""
    variables = source.threadgroup_variables(text)
    for index, v in reversed(list(enumerate(variables))):
        call = f'::msl_runtime::threadgroup_variable({index}, "{v.name}", sizeof({v.type}{v.extents}))'
        reference = f"{v.type} (&{v.name}){v.extents} = *static_cast<{v.type} (*){v.extents}>({call})"
        text = text[: v.start] + reference + text[v.end :]
    return source.replace_attributes(text, lambda name, argument: "")


def _camel_case(builtin: str) -> str:
    return "k" + "".join(word.capitalize() for word in builtin.split("_"))


def bindings(found: list[source.Kernel]) -> str:
    """C++ that follows the shader: what kernel_abi.h says of each kernel, and functions that call them."""
    lines = []
    for k in found:
        values, table = [], []
        for i, a in enumerate(k.arguments):
            argument = f"::msl_runtime::Argument<{k.name}, {i}>"
            if a.attribute in source.BUILTINS:
                builtin = f"::msl_runtime::Builtin::{_camel_case(a.attribute)}"
                values.append(f"::msl_runtime::builtin_value<{argument}>({builtin})")
                table.append(f'::msl_runtime::builtin_argument("{a.name}")')
            else:
                memory, kind = (
                    ("buffer", "MSL_BUFFER") if a.attribute == "buffer" else ("threadgroup_memory", "MSL_THREADGROUP")
                )
                values.append(f"::msl_runtime::memory_value<{argument}>(::msl_runtime::{memory}({a.index}))")
                table.append(f'::msl_runtime::memory_argument<{argument}>("{a.name}", {kind}, {a.index})')
        size = " + ".join(["0", *(f"(sizeof({v.type}{v.extents}) + 15) / 16 * 16" for v in k.threadgroup_variables)])
        lines += [
            f"static void msl_call_{k.name}() {{ {k.name}({', '.join(values)}); }}",
            f"static const MslArgument msl_arguments_{k.name}[] = {{ {', '.join(table)} }};",
            f"extern const MslKernel msl_kernel_{k.name};",
            f"static int msl_run_{k.name}(const MslDispatch* dispatch) {{",
            f"  return ::msl_runtime::run(msl_kernel_{k.name}, msl_call_{k.name}, *dispatch);",
            "}",
            f'const MslKernel msl_kernel_{k.name} = {{ "{k.name}", msl_arguments_{k.name}, {len(k.arguments)}, {size},',
            f"                                      msl_run_{k.name} }};",
        ]
    addresses = ", ".join([*(f"&msl_kernel_{k.name}" for k in found), "nullptr"])
    lines.append(f"static const MslKernel* const msl_kernels[] = {{ {addresses} }};")
    return "\n".join(lines)
