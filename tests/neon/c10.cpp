// What the kernels use of PyTorch's library, so that they run without it.
#include <c10/util/Exception.h>

#include <cstdlib>

namespace c10 {

Error::Error(SourceLocation, std::string) {}
const char* Error::what() const noexcept { return ""; }
ValueError::ValueError(SourceLocation location, std::string text) : Error(location, text) {}

namespace detail {

void torchCheckFail(const char*, const char*, uint32_t, const std::string&) { std::abort(); }
void torchCheckFail(const char*, const char*, uint32_t, const char*) { std::abort(); }
void torchInternalAssertFail(const char*, const char*, uint32_t, const char*, const std::string&) { std::abort(); }
void torchInternalAssertFail(const char*, const char*, uint32_t, const char*, const char*) { std::abort(); }

}  // namespace detail
}  // namespace c10
