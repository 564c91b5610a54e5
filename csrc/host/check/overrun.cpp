// A write past the end, planted on purpose: shows that the address sanitizer sees one in a tensor's memory.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) void overrun(float* values, int64_t n) { values[n] = 1.0f; }
