// sm90/relative.h on the emulator against the definition, pair by pair: every way to compute a piece, queries or keys as
// rows.
#include "emulator.h"

#include "attention/sm90/relative.h"

#include <array>
#include <cstdio>
#include <string>
#include <vector>

#include "common/cuda_launch.h"

using namespace hstu;
using namespace hstu::attention;

namespace {

std::mt19937_64 generator(1);
int integer(int from, int to) { return std::uniform_int_distribution<>(from, to)(generator); }
double uniform() { return std::uniform_real_distribution<>(0, 1)(generator); }

std::vector<int64_t> times_of(int kind, int count) {
    std::vector<int64_t> t(static_cast<size_t>(count));
    int64_t now = kind % 2 ? 1600000000 : -5;
    for (int64_t& x : t) {
        now += uniform() < 0.2 ? 0 : static_cast<int64_t>(std::exp(uniform() * (kind < 4 ? 6 : 12)));
        switch (kind) {
            case 0:
            case 1:
            case 4:
            case 5: x = now; break;
            case 2: x = now * 1000 + integer(0, 999); break;
            case 3: x = integer(-6, 6); break;
            case 6: x = now * 100000; break;
            case 7: x = static_cast<int64_t>(generator()); break;
            case 8: x = static_cast<int64_t>(generator()) >> integer(0, 63); break;
            case 12: x = (int64_t{1} << 60) + static_cast<int64_t>(generator() >> integer(24, 40)); break;
            case 9: x = uniform() < 0.5 ? INT64_MIN + integer(0, 2) : INT64_MAX - integer(0, 2); break;
            default: x = 77 + static_cast<int64_t>(kTimeEdges[integer(0, kind == 10 ? 58 : 120)]) + integer(-1, 1);
        }
    }
    if (kind >= 10) t[0] = 77;
    return t;
}

template <int kGroups, int kCols, bool kRowsAreKeys>
void check(int kind, int round) {
    using Shared = sm90::BiasShared<kGroups, kCols>;
    using Warps = sm90::BiasWarps<Shared, kRowsAreKeys>;
    constexpr int kHeads = 2, kTiles = 3;
    const int len_q = integer(1, 300), len_k = integer(1, 300);
    const int reach = round % 3 == 0 ? 400 : integer(0, 200), num_buckets = round % 4 == 0 ? integer(0, 60) : 128;
    const std::vector<int64_t> query_times = times_of(kind, len_q), key_times = times_of(kind, len_k);
    std::vector<float> position(kHeads * (2 * reach + 1)), time(kHeads * (num_buckets + 1));
    for (float& x : position) x = static_cast<float>(uniform() - 0.5);
    for (float& x : time) x = static_cast<float>(uniform() - 0.5);
    Relative r;
    r.position = round % 5 == 1 ? nullptr : position.data(), r.reach = reach, r.position_head_stride = 2 * reach + 1;
    r.time = round % 5 == 2 ? nullptr : time.data(), r.num_buckets = num_buckets;
    r.time_head_stride = round % 2 ? num_buckets + 1 : 0;
    r.query_times = query_times.data(), r.key_times = key_times.data();

    const int num_rows = kRowsAreKeys ? len_k : len_q, num_cols = kRowsAreKeys ? len_q : len_k;
    const int row0 = 64 * integer(0, (num_rows - 1) / 64);
    const Span wanted{integer(0, num_cols), num_cols};
    std::vector<float4> out(static_cast<size_t>(kHeads) * kTiles * kGroups * 4 * kCols * 4, float4{NAN, NAN, NAN, NAN});
    const auto place = [&](int head, int tile, int group, int warp, int piece) {
        return out.data() + ((((head * kTiles + tile) * kGroups + group) * 4 + warp) * kCols / 32 + piece) * 128;
    };
    emulated::random_numbers.seed(static_cast<unsigned>(round));
    emulated::run_grid(1, sm90::kWarpgroup, [&] {
        auto& shared = *reinterpret_cast<Shared*>(sm90::shared_memory);
        const auto sides = [&](int head) { return sm90::RelativeSides<kRowsAreKeys>(r, head, 0, 0, len_q, len_k); };
        Warps bias(shared, sides(0), 1);
        for (int head = 0; head < kHeads; ++head) {
            bias.begin_block(sides(head), row0, {wanted, {}}, 0);
            for (int tile = 0; tile < kTiles; ++tile) {
                bias.begin_tile(tile * kCols, (tile + 1) * kCols);
                for (int group = 0; group < kGroups; ++group)
                    for (int piece = 0; piece < kCols / 32; piece += 1 + round % 2) {
                        float4* to = place(head, tile, group, threadIdx.x / 32, piece);
                        if (round % 2)
                            bias.write(bias.template read<2>(group, piece), to);
                        else
                            bias.write(group, piece, to);
                    }
            }
        }
    });

    for (int head = 0; head < kHeads; ++head)
        for (int row = row0; row < std::min(row0 + 64 * kGroups, num_rows); ++row)
            for (int col = wanted.begin; col < std::min(num_cols, kTiles * kCols); ++col) {
                const int i = kRowsAreKeys ? col : row, j = kRowsAreKeys ? row : col;
                double expected = 0;
                if (r.position)
                    expected +=
                        position[head * (2 * reach + 1) + reach + clamp_to(i + len_k - len_q - j, -reach, reach)];
                if (r.time)
                    expected += time[head * r.time_head_stride +
                                     std::min(time_bucket(time_difference(query_times[i], key_times[j])), num_buckets)];
                const int in_group = (row - row0) % 64, in_tile = col % kCols;
                const float4& four = place(head, col / kCols, (row - row0) / 64, in_group / 16,
                                           in_tile / 32)[in_tile % 32 / 8 * 32 + in_group % 8 * 4 + col % 8 / 2];
                const float got = (&four.x)[in_group % 16 / 8 * 2 + col % 2];
                if (!(std::fabs(2 * got - expected) <= 1e-6))
                    emulated::fail("times " + std::to_string(kind) + " round " + std::to_string(round) + " row " +
                                   std::to_string(row) + " column " + std::to_string(col) + ": " +
                                   std::to_string(2 * got) + " instead of " + std::to_string(expected));
            }
}

}  // namespace

int main() {
    for (int kind = 0; kind < 13; ++kind)
        for (int round = 0; round < 20; ++round) {
            check<2, 128, false>(kind, round);
            check<3, 64, false>(kind, round);
            check<2, 64, true>(kind, round);
        }
    return 0;
}
