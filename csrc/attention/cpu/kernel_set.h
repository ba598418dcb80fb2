// The kernels of one variant, for every element type and mask. Included by kernels_<variant>.cpp, which names the variant.
//
// Everything here has the variant's namespace or is static: a function that two variants shared would be linked once for
// both, possibly in the form that the running machine cannot execute. For the same reason no standard container is used.
#pragma once

#include "attention/cpu/backward.h"
#include "attention/cpu/forward.h"
#include "attention/cpu/kernels.h"

namespace hstu::attention::cpu::HSTU_CPU_VARIANT {

template <class T>
struct TypeTag {
    using Type = T;
};

// body(TypeTag<element type>)
template <class Body>
static auto with_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat64: return body(TypeTag<double>{});
        case DType::kFloat16: return body(TypeTag<Half>{});
        case DType::kBFloat16: return body(TypeTag<BFloat16>{});
        default: return body(TypeTag<float>{});
    }
}

// body(TypeTag<mask>)
template <class Body>
static auto with_mask(MaskKind mask, const Body& body) {
    switch (mask) {
        case MaskKind::kTarget: return body(TypeTag<TargetMask>{});
        case MaskKind::kInterval: return body(TypeTag<IntervalMask>{});
        default: return body(TypeTag<WindowMask>{});
    }
}

static size_t forward_scratch(const Params& p, DType dtype) {
    return with_type(dtype, [&](auto type) {
        Arena arena(nullptr);
        ForwardScratch<Compute<typename decltype(type)::Type>>(arena, p);
        return arena.used();
    });
}

static size_t backward_scratch(const Params& p, DType dtype) {
    return with_type(dtype, [&](auto type) {
        Arena arena(nullptr);
        BackwardScratch<Compute<typename decltype(type)::Type>>(arena, p);
        return arena.used();
    });
}

static size_t partial_bytes(const Params& p, DType dtype, int len_k) {
    return with_type(dtype, [&](auto type) {
        Arena arena(nullptr);
        Partial<Compute<typename decltype(type)::Type>>(arena, p, len_k);
        return arena.used();
    });
}

static void forward(const Params& p, DType dtype, MaskKind mask, int batch, int head, int block, void* scratch) {
    with_type(dtype, [&](auto type) {
        with_mask(mask, [&](auto mask_type) {
            forward_block<typename decltype(type)::Type, typename decltype(mask_type)::Type>(p, batch, head, block,
                                                                                             scratch);
        });
    });
}

static void backward(const BackwardParams& p, DType dtype, MaskKind mask, const QueryBlocks& blocks, void* partial,
                     void* tables, void* scratch) {
    with_type(dtype, [&](auto type) {
        with_mask(mask, [&](auto mask_type) {
            backward_blocks<typename decltype(type)::Type, typename decltype(mask_type)::Type>(p, blocks, partial,
                                                                                               tables, scratch);
        });
    });
}

static void finish(const BackwardParams& p, DType dtype, int batch, int head, void* partials, int count, int row0,
                   int rows) {
    with_type(dtype, [&](auto type) {
        finish_rows<typename decltype(type)::Type>(p, batch, head, partials, count, row0, rows);
    });
}

#define HSTU_CPU_STRING_OF(name) #name
#define HSTU_CPU_STRING(name) HSTU_CPU_STRING_OF(name)

static constexpr Kernels kKernels = {
    HSTU_CPU_STRING(HSTU_CPU_VARIANT), forward_scratch, backward_scratch, partial_bytes, forward, backward, finish};

}  // namespace hstu::attention::cpu::HSTU_CPU_VARIANT
