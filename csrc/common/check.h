// HSTU_CHECK(condition, parts...): throws std::invalid_argument (ValueError in Python) with the parts joined.
// The text is put together only when the check fails.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/tensor.h"

namespace hstu {

// As torch prints a shape: [3, 4].
struct Shape {
    const Tensor& tensor;
};

// As torch prints a device: cpu, cuda:0.
struct Device {
    int index;
};

// append(text, part): no streams, whose locales break where one process holds two copies of the C++ library.
inline void append(std::string& text, const char* part) { text += part; }
inline void append(std::string& text, const std::string& part) { text += part; }
inline void append(std::string& text, DType part) { text.append("torch.").append(name_of(part)); }
inline void append(std::string& text, Device part) {
    text += part.index < 0 ? "cpu" : "cuda:" + std::to_string(part.index);
}
inline void append(std::string& text, double part) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", part);
    text += digits;
}
template <class Integer, class = std::enable_if_t<std::is_integral_v<Integer>>>
void append(std::string& text, Integer part) {
    text += std::to_string(part);
}
inline void append(std::string& text, Shape part) {
    text += '[';
    for (int i = 0; i < part.tensor.rank; ++i) text.append(i ? ", " : "").append(std::to_string(part.tensor.shape[i]));
    text += ']';
}

template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
    std::string text;
    (append(text, parts), ...);
    throw Error(text);
}

}  // namespace hstu

#define HSTU_CHECK(condition, ...)                                                               \
    do {                                                                                         \
        if (__builtin_expect(!(condition), 0)) ::hstu::fail<std::invalid_argument>(__VA_ARGS__); \
    } while (false)
