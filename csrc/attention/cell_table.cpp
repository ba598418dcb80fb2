#include "attention/cell_table.h"

#include <array>
#include <string>

#include "attention/api.h"
#include "build_info.h"
#include "common/check.h"
#include "common/family.h"

namespace hstu::attention {
namespace {

constexpr int kArchs = 2, kDTypes = 2, kBuckets = 4, kMasks = 3, kBiases = 3;

int bucket_index(int head_dim) { return head_dim <= 32 ? 0 : head_dim <= 64 ? 1 : head_dim <= 128 ? 2 : 3; }

int index_of(Direction direction, Arch arch, DType dtype, int head_dim, MaskKind mask, BiasKind bias) {
    int index = static_cast<int>(direction);
    index = index * kArchs + static_cast<int>(arch);
    index = index * kDTypes + (dtype == DType::kBFloat16 ? 1 : 0);
    index = index * kBuckets + bucket_index(head_dim);
    index = index * kMasks + static_cast<int>(mask);
    return index * kBiases + static_cast<int>(bias);
}

using Table = std::array<const Cell*, 2 * kArchs * kDTypes * kBuckets * kMasks * kBiases>;

Table make_table() {
    Table table{};
    for (const Cell& cell : cells()) {
        const Direction direction = cell.forward ? Direction::kForward : Direction::kBackward;
        table[index_of(direction, cell.arch, cell.dtype, cell.head_dim, cell.mask, cell.bias)] = &cell;
    }
    return table;
}

// As tools/codegen/generate.py names the cells.
std::string cell_name(Direction direction, DType dtype, int head_dim, MaskKind mask, BiasKind bias) {
    static const char* const kMaskNames[kMasks] = {"window", "target", "interval"};
    static const char* const kBiasSuffixes[kBiases] = {"", "_rab", "_relative"};
    return std::string("attn_") + (direction == Direction::kForward ? "fwd" : "bwd") + "_sm80_" +
           (dtype == DType::kBFloat16 ? "bf16" : "fp16") + "_d" + std::to_string(head_dim_bucket(head_dim)) + "_" +
           kMaskNames[static_cast<int>(mask)] + kBiasSuffixes[static_cast<int>(bias)];
}

[[noreturn]] void fail_missing(const std::string& name) {
    fail<MissingKernelError>("hstu_ext.attention: kernel ", name, " is not in this build, which has the set \"",
                             build::kSet, "\" (", cells().size(),
                             " attention cells, see hstu_ext.cells()). Install with ",
                             "`pip install . -C cmake.define.HSTU_EXT_SET=full` (CMake: -DHSTU_EXT_SET=full)");
}

}  // namespace

const Cell& find_cell(Direction direction, int compute_capability, DType dtype, int head_dim, MaskKind mask,
                      BiasKind bias) {
    static const Table table = make_table();
    if (compute_capability < 80)
        fail<MissingKernelError>("hstu_ext.attention: GPU kernels need compute capability 8.0 or newer, got ",
                                 compute_capability / 10, ".", compute_capability % 10);
    if (compute_capability == 90 && sm90_wanted())
        if (const Cell* cell = table[index_of(direction, Arch::kSm90, dtype, head_dim, mask, bias)]) return *cell;
    if (const Cell* cell = table[index_of(direction, Arch::kSm80, dtype, head_dim, mask, bias)]) return *cell;
    fail_missing(cell_name(direction, dtype, head_dim, mask, bias));
}

}  // namespace hstu::attention
