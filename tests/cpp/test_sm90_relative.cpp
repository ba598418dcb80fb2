// sm90/relative.h and relative_scores.h on the emulator against the definition, pair by pair: every way to compute a piece.
#include "emulator.h"

#include "attention/sm90/relative_scores.h"

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

// How often a piece came out as what.
struct {
    int constant, edge[2], edges[2], look_up, wide;  // [rows are earlier]

    void count(sm90::PieceTimes piece) {
        const int n = piece.edges();
        if (piece.has_values())
            ++(piece.code & sm90::PieceTimes::kWide ? wide : look_up);
        else
            ++(n == 0 ? constant : n == 1 ? edge[piece.is_earlier()] : edges[piece.is_earlier()]);
    }
    bool is_complete() const { return constant && edge[0] && edge[1] && edges[0] && edges[1] && look_up && wide; }
} seen;

// The values of one tile for one warp, written when they are read.
template <class Shared>
struct Values {
    sm90::RelativeSides sides;
    const typename Shared::Place& place;
    const typename Shared::Tile& tile;
    int group, row0, col0;
    float4* buffer;
    int piece = -1;

    void begin() {
        const int* const pieces = tile.pieces[group * 4 + threadIdx.x / 32];
        do ++piece;
        while (!sm90::PieceTimes{pieces[piece]}.has_values());
        if (pieces[piece] & sm90::PieceTimes::kWide)
            sm90::BiasWarps<Shared>::look_up_wide(sides, place, tile, group, piece, row0, col0, buffer);
        else
            sm90::BiasWarps<Shared>::look_up(place, tile, group, piece, buffer);
        __syncwarp();
    }
    float4 operator()(int n) const { return buffer[n * 32 + lane()]; }
    void end() const { __syncwarp(); }
};

template <int kGroups, int kCols>
void check(int kind, int round) {
    constexpr int kHeads = 2, kTiles = 3;
    using Shared = sm90::BiasShared<kGroups, kCols, kHeads, 2>;
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

    const int row0 = 64 * integer(0, (len_q - 1) / 64);
    const Span wanted{integer(0, len_k), len_k};
    const WindowMask mask(len_q, len_k, -1, -1);
    const float score = static_cast<float>(uniform()), alpha = 0.25f;
    std::vector<float> out(static_cast<size_t>(kHeads) * kGroups * 64 * kTiles * kCols, NAN);
    const auto place_of = [&](int head, int row, int col) {
        return (static_cast<size_t>(head) * kGroups * 64 + row) * kTiles * kCols + col;
    };
    std::vector<float4> buffers(4 * 128);
    emulated::random_numbers.seed(static_cast<unsigned>(round));
    emulated::run_grid(1, sm90::kWarpgroup, [&] {
        auto& shared = *reinterpret_cast<Shared*>(sm90::shared_memory);
        const auto sides = [&](int head) { return sm90::RelativeSides(r, head, 0, 0, len_q, len_k); };
        const auto meet = [] { sm90::named_sync(1, sm90::kWarpgroup); };
        const int warp = threadIdx.x / 32;
        sm90::BiasWarps<Shared> bias(alpha);
        for (int head = 0, buffer = 0; head < kHeads; ++head) {
            const auto& place = shared.places[head];
            bias.begin_block(sides(head), row0, {wanted, {}}, 0, shared.places[head]);
            bias.write_tables(sides(head), shared.places[head]);
            for (int t = 0; t < kTiles; ++t, buffer ^= 1) {
                auto& tile = shared.tiles[buffer];
                bias.write_tile(tile, (t + 1) * kCols);
                meet();
                bias.find(tile, t * kCols);
                meet();
                for (int group = 0; group < kGroups; ++group) {
                    Values<Shared> values{
                        sides(head), place, tile, group, row0, t * kCols, buffers.data() + warp * 128};
                    sm90::Accumulator<kCols> s;
                    float constants[kCols / 32];
                    const sm90::BiasOfTile<Shared> of_tile(place, tile, group);
                    of_tile.begin_scores(s, values);
                    of_tile.read_constants(constants);
                    for (float& x : s.x) x += score;
                    sm90::activate_with_constants<false>(s, constants, mask, 0, 0, 0.5f * alpha);
                    for (int i = 0; i < kCols / 2; ++i)
                        out[place_of(head, 64 * group + s.row() + i / 2 % 2 * 8,
                                     t * kCols + s.col() + i / 4 * 8 + i % 2)] = s.x[i];
                    for (int i = 0; i < kCols / 32 && lane() == 0; ++i) seen.count({tile.pieces[group * 4 + warp][i]});
                }
                meet();
            }
        }
    });

    for (int head = 0; head < kHeads; ++head)
        for (int row = row0; row < std::min(row0 + 64 * kGroups, len_q); ++row)
            for (int col = wanted.begin; col < std::min(len_k, kTiles * kCols); ++col) {
                double x = alpha * score;
                if (r.position)
                    x += position[head * (2 * reach + 1) + reach + clamp_to(row + len_k - len_q - col, -reach, reach)];
                if (r.time)
                    x += time[head * r.time_head_stride +
                              std::min(time_bucket(time_difference(query_times[row], key_times[col])), num_buckets)];
                const double expected = x / (1 + std::exp(-x)), got = out[place_of(head, row - row0, col)];
                if (!(std::fabs(got - expected) <= 1e-6))
                    emulated::fail("times " + std::to_string(kind) + " round " + std::to_string(round) + " row " +
                                   std::to_string(row) + " column " + std::to_string(col) + ": " + std::to_string(got) +
                                   " instead of " + std::to_string(expected));
            }
}

}  // namespace

int main() {
    for (int kind = 0; kind < 13; ++kind)
        for (int round = 0; round < 20; ++round) {
            check<2, 128>(kind, round);
            check<3, 64>(kind, round);
        }
    if (!seen.is_complete()) emulated::fail("not every kind of piece occurred");
    std::printf("pieces: %d constant, %d + %d with an edge, %d + %d with several, %d looked up, %d in 64 bits\n",
                seen.constant, seen.edge[0], seen.edge[1], seen.edges[0], seen.edges[1], seen.look_up, seen.wide);
    return 0;
}
