// HSTU_CHECK(condition, parts...): throws std::invalid_argument (ValueError in Python) with the parts joined.
// The text is put together only when the check fails.
#pragma once

#include <sstream>
#include <stdexcept>

#include "common/tensor.h"

namespace hstu {

inline std::ostream& operator<<(std::ostream& out, DType dtype) { return out << "torch." << name_of(dtype); }

// As torch prints a shape: [3, 4].
struct Shape {
    const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& out, Shape shape) {
    out << '[';
    for (int i = 0; i < shape.tensor.rank; ++i) out << (i ? ", " : "") << shape.tensor.shape[i];
    return out << ']';
}

// As torch prints a device: cpu, cuda:0.
struct Device {
    int index;
};

inline std::ostream& operator<<(std::ostream& out, Device device) {
    return device.index < 0 ? out << "cpu" : out << "cuda:" << device.index;
}

template <class Error, class... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw Error(text.str());
}

}  // namespace hstu

#define HSTU_CHECK(condition, ...)                                                               \
    do {                                                                                         \
        if (__builtin_expect(!(condition), 0)) ::hstu::fail<std::invalid_argument>(__VA_ARGS__); \
    } while (false)
