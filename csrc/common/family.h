// Which kernels a GPU runs where there are some of two families.
#pragma once

#include <cstdlib>
#include <cstring>

namespace hstu {

// HSTU_EXT_GPU=sm80 makes a Hopper GPU run the sm80 family, to compare the two.
inline bool sm90_wanted() {
    static const char* const family = std::getenv("HSTU_EXT_GPU");
    return !family || std::strcmp(family, "sm80") != 0;
}

}  // namespace hstu
