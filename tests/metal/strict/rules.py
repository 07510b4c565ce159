"""What Metal's compiler refuses and clang does not, found in the syntax tree; and the project's own conventions."""

import re
from collections.abc import Iterator
from pathlib import Path

from clang import cindex
from clang.cindex import Cursor, CursorKind, StorageClass, TranslationUnit, Type, TypeKind

MAX_BUFFER_INDEX = 30
MAX_THREADGROUP_BYTES = 32768
DEFAULT, DEVICE, CONSTANT, THREADGROUP = range(4)  # address spaces

Found = tuple[str, int, str]

_INDEX_TYPES = {"uint", "ushort"}
_POSITION_TYPES = {f"{scalar}{size}" for scalar in _INDEX_TYPES for size in ("", "2", "3")}
_ATTRIBUTE_TYPES = {
    "thread_position_in_grid": _POSITION_TYPES,
    "thread_position_in_threadgroup": _POSITION_TYPES,
    "threadgroup_position_in_grid": _POSITION_TYPES,
    "threads_per_threadgroup": _POSITION_TYPES,
    "threadgroups_per_grid": _POSITION_TYPES,
    "threads_per_grid": _POSITION_TYPES,
    "thread_index_in_threadgroup": _INDEX_TYPES,
    "thread_index_in_simdgroup": _INDEX_TYPES,
    "simdgroup_index_in_threadgroup": _INDEX_TYPES,
    "simdgroups_per_threadgroup": _INDEX_TYPES,
    "threads_per_simdgroup": _INDEX_TYPES,
}
# Words of Metal, CUDA or later C++ that are no names. Those that are macros here do not even parse as one.
_RESERVED = re.compile(
    r"(bool|u?(char|short|int|long)|b?(half|float)|double)[234]?|vertex|fragment|visible|stitchable|intersection|"
    r"threadgroup_imageblock|object_data|ray_data|texture(1d|2d|3d|cube)|depth2d|sampler|(threadI|blockI)dx|"
    r"(block|grid)Dim|warpSize|char8_t|concept|consteval|constinit|co_(await|return|yield)|requires"
)

_FORBIDDEN = {
    CursorKind.GOTO_STMT: "goto",
    CursorKind.INDIRECT_GOTO_STMT: "goto",
    CursorKind.LAMBDA_EXPR: "a lambda",
    CursorKind.CXX_NEW_EXPR: "new",
    CursorKind.CXX_DELETE_EXPR: "delete",
    CursorKind.CXX_THROW_EXPR: "throw",
    CursorKind.CXX_TRY_STMT: "try",
    CursorKind.CXX_DYNAMIC_CAST_EXPR: "dynamic_cast",
    CursorKind.CXX_TYPEID_EXPR: "typeid",
    CursorKind.ASM_STMT: "asm",
    CursorKind.MS_ASM_STMT: "asm",
    CursorKind.STRING_LITERAL: "a string",
}
_FUNCTIONS = {
    CursorKind.FUNCTION_DECL,
    CursorKind.FUNCTION_TEMPLATE,
    CursorKind.CXX_METHOD,
    CursorKind.CONSTRUCTOR,
    CursorKind.DESTRUCTOR,
    CursorKind.CONVERSION_FUNCTION,
}
_DECLARATIONS = {CursorKind.VAR_DECL, CursorKind.PARM_DECL, CursorKind.FIELD_DECL}
_CASTS = {
    CursorKind.CSTYLE_CAST_EXPR,
    CursorKind.CXX_FUNCTIONAL_CAST_EXPR,
    CursorKind.CXX_STATIC_CAST_EXPR,
    CursorKind.CXX_REINTERPRET_CAST_EXPR,
    CursorKind.CXX_CONST_CAST_EXPR,
}
_POINTERS = {TypeKind.POINTER, TypeKind.LVALUEREFERENCE, TypeKind.RVALUEREFERENCE}
_ARRAYS = {TypeKind.CONSTANTARRAY, TypeKind.INCOMPLETEARRAY, TypeKind.DEPENDENTSIZEDARRAY, TypeKind.VARIABLEARRAY}
_DOUBLES = {TypeKind.DOUBLE, TypeKind.LONGDOUBLE, TypeKind.FLOAT128}
_NARROW_FLOATS = {"_Float16": "half", "__bf16": "bfloat"}  # by clang's names
_SHARED_SCALARS = {TypeKind.INT, TypeKind.UINT, TypeKind.FLOAT}


def _kind(of: Type) -> TypeKind | None:
    """None for a kind that libclang's Python bindings do not know, such as half."""
    try:
        return of.kind
    except ValueError:
        return None


def _element(of: Type) -> Type:
    """The element of an array of arrays, or the type itself; canonical."""
    of = of.get_canonical()
    while _kind(of) in _ARRAYS:
        of = of.element_type.get_canonical()
    return of


def _narrow_float(of: Type) -> str | None:
    """Which of half and bfloat it is, in whatever address space."""
    return _NARROW_FLOATS.get(_element(of).spelling.split(" ")[-1])


def _address_space(of: Type) -> int:
    return max(of.get_canonical().get_address_space(), _element(of).get_address_space())


def _pointee(of: Type) -> Type | None:
    """What it points or refers to, or the elements of an array do."""
    of = _element(of)
    return of.get_pointee() if _kind(of) in _POINTERS else None


def _notes(cursor: Cursor) -> list[str]:
    return [child.spelling for child in cursor.get_children() if child.kind == CursorKind.ANNOTATE_ATTR]


def _words(cursor: Cursor) -> list[str]:
    return [token.spelling for token in cursor.get_tokens()]


def _operator(cursor: Cursor) -> str:
    """The sign of a binary operator."""
    left_end = next(cursor.get_children()).extent.end.offset
    return next((token.spelling for token in cursor.get_tokens() if token.extent.start.offset >= left_end), "")


class _Walk:
    """One pass over the syntax tree."""

    def __init__(self, include: Path) -> None:
        self.include = str(include)
        self.found: list[Found] = []
        self.calls: dict[str, set[str]] = {}
        self.functions: dict[str, Cursor] = {}
        self.kernels: set[str] = set()
        self.threadgroup_bytes: dict[str, int] = {}
        self.explicit: set[int] = set()  # operands of casts
        self.chosen: set[str] = set()  # functions that metal::precise has too

    def add(self, cursor: Cursor, message: str) -> None:
        place = cursor.location
        self.found.append((place.file.name if place.file else "", place.line, message))

    def is_ours(self, cursor: Cursor) -> bool:
        file = cursor.location.file
        return file is not None and not file.name.startswith(self.include)

    def visit_top(self, cursor: Cursor) -> None:
        for child in cursor.get_children():
            if self.is_ours(child):
                self.visit(child, None, cursor)
            elif child.kind == CursorKind.NAMESPACE:
                self.chosen |= {
                    function.spelling
                    for space in child.get_children()
                    if space.spelling == "precise"
                    for function in space.get_children()
                }

    def visit(self, cursor: Cursor, function: Cursor | None, parent: Cursor) -> None:
        kind = cursor.kind
        if kind in _FORBIDDEN:
            self.add(cursor, f"{_FORBIDDEN[kind]} is not Metal")
        if kind in _FUNCTIONS:
            self.visit_function(cursor)
            function = cursor
        elif kind in _DECLARATIONS:
            self.visit_declaration(cursor, function, parent)
        elif kind in _CASTS:
            self.visit_cast(cursor)
        elif kind == CursorKind.FLOATING_LITERAL:
            self.visit_literal(cursor)
        elif kind in (CursorKind.CALL_EXPR, CursorKind.DECL_REF_EXPR, CursorKind.OVERLOADED_DECL_REF) and function:
            self.visit_reference(cursor, function)
        elif kind == CursorKind.UNEXPOSED_EXPR:
            self.visit_conversion(cursor)
        elif kind in (CursorKind.BINARY_OPERATOR, CursorKind.COMPOUND_ASSIGNMENT_OPERATOR, CursorKind.UNARY_OPERATOR):
            self.visit_operator(cursor)
        if kind != CursorKind.FLOATING_LITERAL and _kind(_element(cursor.type)) in _DOUBLES:
            self.add(cursor, "there is no double in Metal")
        if cursor.kind.is_declaration() and _RESERVED.fullmatch(cursor.spelling):
            self.add(cursor, f"'{cursor.spelling}' is a reserved word")
        for child in cursor.get_children():
            self.visit(child, function, cursor)

    # Functions

    def visit_function(self, cursor: Cursor) -> None:
        name = cursor.get_usr()
        self.functions[name] = cursor
        self.calls.setdefault(name, set())
        if cursor.kind == CursorKind.CXX_METHOD and cursor.is_virtual_method():
            self.add(cursor, "virtual is not Metal")
        result = _pointee(cursor.result_type)
        notes = _notes(cursor)
        if result is not None and _address_space(result) == DEFAULT and "thread" not in notes:
            self.add(cursor, f"the result of '{cursor.spelling}' has no address space")
        if "kernel" in notes:
            self.kernels.add(name)
            self.visit_kernel(cursor)
        else:
            for child in cursor.get_children():
                if any(note.startswith("attribute:") for note in _notes(child)):
                    self.add(child, f"'{child.spelling}' has an attribute, but '{cursor.spelling}' is no kernel")

    def visit_reference(self, cursor: Cursor, function: Cursor) -> None:
        targets = [cursor.referenced]
        if cursor.kind == CursorKind.OVERLOADED_DECL_REF:
            count = cindex.conf.lib.clang_getNumOverloadedDecls(cursor)
            targets = [cindex.conf.lib.clang_getOverloadedDecl(cursor, i) for i in range(count)]
        for target in targets:
            if target is None or target.kind not in _FUNCTIONS:
                continue
            self.calls[function.get_usr()].add(target.get_usr())
            if cursor.kind != CursorKind.CALL_EXPR and self.must_be_chosen(target):
                self.add(cursor, f"say precise::{target.spelling} or fast::{target.spelling}")

    def must_be_chosen(self, target: Cursor) -> bool:
        """Whether it is metal::f of which there is metal::precise::f."""
        return target.spelling in self.chosen and target.semantic_parent.spelling == "metal"

    # Kernels

    def visit_kernel(self, cursor: Cursor) -> None:
        if cursor.kind == CursorKind.FUNCTION_TEMPLATE:
            self.add(cursor, f"kernel '{cursor.spelling}' is a template")
            return
        if _kind(cursor.result_type.get_canonical()) != TypeKind.VOID:
            self.add(cursor, f"kernel '{cursor.spelling}' must return void")
        used: set[str] = set()
        sizes: set[str] = set()
        for parameter in cursor.get_arguments():
            attributes = [n.removeprefix("attribute:") for n in _notes(parameter) if n.startswith("attribute:")]
            if len(attributes) != 1:
                self.add(parameter, f"'{parameter.spelling}' needs exactly one attribute, has {len(attributes)}")
                continue
            if attributes[0] in used:
                self.add(parameter, f"[[{attributes[0].strip(':')}]] is used twice")
            used.add(attributes[0])
            name, _, index = attributes[0].partition(":")
            if name in _ATTRIBUTE_TYPES:
                sizes |= self.check_index(parameter, name)
            else:
                self.check_memory(parameter, name, index)
        if len(sizes) > 1:
            self.add(cursor, "positions and sizes must be vectors of the same number of components")

    def check_index(self, parameter: Cursor, attribute: str) -> set[str]:
        kind = parameter.type.spelling.removeprefix("const ")
        if kind not in _ATTRIBUTE_TYPES[attribute]:
            self.add(parameter, f"[[{attribute}]] cannot have the type {kind}")
        return {kind[-1]} & {"2", "3"}

    def check_memory(self, parameter: Cursor, attribute: str, index: str) -> None:
        if not index.isdigit() or int(index) > MAX_BUFFER_INDEX:
            self.add(parameter, f"[[{attribute}({index})]]: the index must be from 0 to {MAX_BUFFER_INDEX}")
        target = _pointee(parameter.type)
        allowed = (DEVICE, CONSTANT) if attribute == "buffer" else (THREADGROUP,)
        if target is None or _address_space(target) not in allowed:
            spaces = "device or constant" if attribute == "buffer" else "threadgroup"
            self.add(parameter, f"'{parameter.spelling}' must be a {spaces} pointer or reference")
            return
        if _pointee(target) is not None:
            self.add(parameter, f"'{parameter.spelling}' is a pointer to pointers")
        if attribute == "buffer":
            self.check_shared(_element(target))

    def check_shared(self, struct: Type) -> None:
        """A struct that the host fills must be laid out alike by all compilers."""
        if _kind(struct) != TypeKind.RECORD:
            return
        for field in struct.get_fields():
            element = _element(field.type)
            if _kind(element) == TypeKind.RECORD:
                self.check_shared(element)
            elif _kind(element) not in _SHARED_SCALARS or field.is_bitfield():
                self.add(field, f"'{field.spelling}' is shared with the host and no 4-byte scalar")

    # Declarations

    def visit_declaration(self, cursor: Cursor, function: Cursor | None, parent: Cursor) -> None:
        target = _pointee(cursor.type)
        if target is None and cursor.kind == CursorKind.PARM_DECL and _kind(cursor.type.get_canonical()) in _ARRAYS:
            target = _element(cursor.type)  # an array parameter is a pointer
        if target is not None:
            if _kind(target.get_canonical()) == TypeKind.FUNCTIONPROTO:
                self.add(cursor, f"'{cursor.spelling}' is a pointer to a function")
            elif _address_space(target) == DEFAULT and "thread" not in _notes(cursor):
                self.add(cursor, f"'{cursor.spelling}' has no address space")
        if cursor.kind != CursorKind.VAR_DECL:
            return
        space = _address_space(cursor.type)
        if function is None:
            if space != CONSTANT:
                self.add(cursor, f"'{cursor.spelling}' at program scope must be constant")
        elif space == THREADGROUP:
            self.check_threadgroup_variable(cursor, function, parent)
        elif space != DEFAULT:
            self.add(cursor, f"'{cursor.spelling}' cannot be in that address space here")
        elif cursor.storage_class == StorageClass.STATIC:
            self.add(cursor, f"'{cursor.spelling}' is a static local variable")

    def check_threadgroup_variable(self, cursor: Cursor, function: Cursor, parent: Cursor) -> None:
        name = function.get_usr()
        body = [child for child in function.get_children() if child.kind == CursorKind.COMPOUND_STMT]
        statements = {statement.hash for b in body for statement in b.get_children()}
        if name not in self.kernels or parent.hash not in statements:
            self.add(cursor, f"threadgroup variable '{cursor.spelling}' is not at the top of a kernel")
            return
        if "=" in _words(cursor):
            self.add(cursor, f"threadgroup variable '{cursor.spelling}' cannot be initialised")
        size = self.threadgroup_bytes.get(name, 0) + max(cursor.type.get_size(), 0)
        self.threadgroup_bytes[name] = size
        if size > MAX_THREADGROUP_BYTES:
            self.add(cursor, f"{size} bytes of threadgroup memory, {MAX_THREADGROUP_BYTES} is the most")

    # Expressions

    def visit_cast(self, cursor: Cursor) -> None:
        operand = [child for child in cursor.get_children() if child.kind.is_expression()][-1:]
        self.explicit.update(child.hash for child in operand)
        target = _pointee(cursor.type)
        if target is None or not operand:
            return
        origin = _pointee(operand[0].type) or operand[0].type
        if _address_space(origin) != _address_space(target):
            self.add(cursor, f"the cast to {cursor.type.spelling} changes the address space")
        words = _words(cursor)
        ends = [words.index(end) for end in (">", ")") if end in words]
        if _address_space(target) == DEFAULT and "thread" not in words[: min(ends, default=0)]:
            self.add(cursor, f"the cast to {cursor.type.spelling} has no address space")

    def visit_literal(self, cursor: Cursor) -> None:
        text = "".join(_words(cursor)[:1])
        if text[:1] in tuple(".0123456789") and text[-1] not in "fFhH":
            self.add(cursor, f"{text} needs the suffix f or h")

    def visit_operator(self, cursor: Cursor) -> None:
        if not any(_narrow_float(child.type) == "bfloat" for child in cursor.get_children()):
            return
        if cursor.kind == CursorKind.UNARY_OPERATOR and _words(cursor)[0] in ("*", "&"):
            return
        if cursor.kind != CursorKind.BINARY_OPERATOR or _operator(cursor) != "=":
            self.add(cursor, "bfloat has no arithmetic: convert to float")

    def visit_conversion(self, cursor: Cursor) -> None:
        children = list(cursor.get_children())
        if len(children) != 1 or cursor.hash in self.explicit:
            return
        to, origin = cursor.type, children[0].type
        if _narrow_float(to) != _narrow_float(origin):
            self.add(cursor, f"implicit conversion from {origin.spelling} to {to.spelling}")

    # Calls

    def recursion(self) -> Iterator[Found]:
        state: dict[str, bool] = {}  # whether its visit is over

        def visit(name: str) -> Iterator[Found]:
            state[name] = False
            for callee in sorted(self.calls.get(name, ())):
                if callee not in self.functions:
                    continue
                if state.get(callee) is False:
                    place = self.functions[callee].location
                    yield place.file.name, place.line, f"'{self.functions[callee].spelling}' is recursive"
                elif callee not in state:
                    yield from visit(callee)
            state[name] = True

        for name in list(self.functions):
            if name not in state:
                yield from visit(name)

    def called_kernels(self) -> Iterator[Found]:
        for name, callees in self.calls.items():
            for kernel in callees & self.kernels:
                place = self.functions[name].location
                yield (
                    place.file.name,
                    place.line,
                    f"'{self.functions[kernel].spelling}' is a kernel and cannot be called",
                )


def broken(unit: TranslationUnit, include: Path) -> list[Found]:
    """(file, line, message) of every rule that the shader breaks; what is declared in `include` is not looked at."""
    walk = _Walk(include)
    walk.visit_top(unit.cursor)
    return [*walk.found, *walk.recursion(), *walk.called_kernels()]
