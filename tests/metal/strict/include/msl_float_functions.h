// The functions of one floating-point type, MSL_T. Included once for each.
namespace metal {
#define MSL_DECLARE_UNARY(name, value) MSL_T name(MSL_T);
#define MSL_DECLARE_BINARY(name, value) MSL_T name(MSL_T, MSL_T);
#define MSL_DECLARE_TERNARY(name, value) MSL_T name(MSL_T, MSL_T, MSL_T);
#define MSL_DECLARE_CHOSEN            \
  MSL_CHOSEN_UNARY(MSL_DECLARE_UNARY) \
  MSL_CHOSEN_BINARY(MSL_DECLARE_BINARY)
MSL_DECLARE_CHOSEN
namespace precise {
MSL_DECLARE_CHOSEN
}
namespace fast {
MSL_DECLARE_CHOSEN
}
MSL_UNARY(MSL_DECLARE_UNARY)
MSL_BINARY(MSL_DECLARE_BINARY)
MSL_TERNARY(MSL_DECLARE_TERNARY)
#undef MSL_DECLARE_CHOSEN
#undef MSL_DECLARE_UNARY
#undef MSL_DECLARE_BINARY
#undef MSL_DECLARE_TERNARY
}  // namespace metal
#undef MSL_T
