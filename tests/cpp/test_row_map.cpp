// csrc/jagged/row_map.h: the GPU kernel's copies, done on the host lane by lane, against brute force.
//
// Small random problems of joins, splits and dense copies: every byte of an output is written once, is that of the right
// row, and comes from inside of a tensor. With garbage in the offsets the first and the last still hold.
#include "jagged/row_map.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

using namespace hstu;
using namespace hstu::jagged;

namespace {

std::mt19937 generator(0);

int64_t any(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

[[noreturn]] void fail(const char* text) {
    std::printf("FAILED %s\n", text);
    std::exit(1);
}

// Rows with a gap after each, and how often each byte has been written.
struct Buffer {
    int64_t rows, row_bytes, stride;
    std::vector<char> data, writes;

    Buffer(int64_t rows, int64_t row_bytes, int64_t gap)
        : rows(rows), row_bytes(row_bytes), stride(row_bytes + gap), data(rows * stride + 1), writes(data.size()) {
        for (char& byte : data) byte = static_cast<char>(any(1, 255));
    }
    Rows view() { return {data.data(), rows, stride}; }
    const char* row(int64_t i) const { return data.data() + i * stride; }
    bool contains(const char* begin, int64_t bytes) const {
        const int64_t at = begin - data.data();
        return at >= 0 && at < rows * stride && at % stride + bytes <= row_bytes;
    }
};

int largest_unit(int64_t a, int64_t b) {
    const int64_t bits = 16 | a | b;
    return static_cast<int>(bits & -bits);
}

template <class Map>
int64_t search_by_warp(const Map& map, const Tile& tile) {
    WarpSearch search{0, map.boundaries()};
    for (int round = 0; !search.is_done(); ++round) {
        if (round > 12) fail("the search of a warp does not end");
        int not_beyond = 0;
        for (int lane = 0; lane < 32; ++lane) {
            const int64_t probe = search.probe(lane);
            not_beyond += probe < search.high && map.at(tile, probe) <= tile.first_row;
        }
        search.narrow(not_beyond);
    }
    if (search.low < 0 || search.low > map.boundaries()) fail("the search of a warp leaves the boundaries");
    return search.low;
}

// The bytes of row r of a tile.
template <class Map>
void copy_row(const Map& map, const Tile& tile, int r, const char* from, char* to, const std::vector<Buffer*>& outputs,
              const std::vector<Buffer*>& inputs) {
    const int unit = map.tiling.unit;
    for (int i = r * tile.columns; i < (r + 1) * tile.columns; ++i) {
        if (tile.rows > 1 && map.tiling.row_of_unit(i) != r) fail("a unit is taken for one of another row");
        const int64_t at = tile.first_byte + (i - r * tile.columns) * unit;
        bool is_read = from == nullptr, is_written = false;
        for (const Buffer* input : inputs) is_read = is_read || input->contains(from + at, unit);
        if (!is_read) fail("a source outside of the inputs");
        for (Buffer* output : outputs) {
            if (!output->contains(to + at, unit)) continue;
            is_written = true;
            for (int64_t k = at; k < at + unit; ++k) {
                to[k] = from ? from[k] : reinterpret_cast<const char*>(&map.fill)[k % 8];
                ++output->writes[to + k - output->data.data()];
            }
        }
        if (!is_written) fail("a target outside of the outputs");
    }
}

// As hstu_jagged_copy in cuda.cu.
template <class Map>
void copy(const Map& map, const std::vector<Buffer*>& outputs, const std::vector<Buffer*>& inputs) {
    for (int64_t index = 0; index < map.tiling.count; ++index) {
        const Tile tile = map.tile(index);
        if (tile.rows == 0) continue;
        const auto boundary = [&](int64_t i) { return map.at(tile, i); };
        int64_t beyond = search_by_warp(map, tile);
        for (int first = 0; first < tile.rows; first += 32) {
            const int rows = min_of(tile.rows - first, 32);
            int64_t last = beyond;
            for (int r = 0; r < rows; ++r) {
                const int64_t row = tile.first_row + first + r;
                last = first_beyond(boundary, beyond, map.boundaries(), row);
                copy_row(map, tile, r, map.from(tile, last - 1, row), map.to(tile, row), outputs, inputs);
            }
            beyond = last;
        }
    }
    for (const Buffer* output : outputs)
        for (int64_t i = 0; i < static_cast<int64_t>(output->data.size()); ++i) {
            const bool in_row = i < output->rows * output->stride && i % output->stride < output->row_bytes;
            if (output->writes[i] != in_row) fail("a byte of an output is not written once");
        }
}

void expect(const Buffer& output, int64_t row, const char* source, uint64_t fill = 0) {
    for (int64_t k = 0; k < output.row_bytes; ++k)
        if (output.row(row)[k] != (source ? source[k] : reinterpret_cast<const char*>(&fill)[k % 8]))
            fail("a wrong row");
}

template <class Offset>
std::vector<Offset> offsets_of(const std::vector<int64_t>& lengths, int64_t before, bool garbage) {
    std::vector<Offset> ends{static_cast<Offset>(before)};
    for (const int64_t length : lengths) ends.push_back(static_cast<Offset>(ends.back() + length));
    if (garbage)
        for (Offset& end : ends)
            if (any(0, 2) == 0) end = static_cast<Offset>(any(0, 1) ? any(-40, 40) : any(INT64_MIN, INT64_MAX));
    return ends;
}

int64_t any_row_bytes() {
    const int64_t sizes[] = {0, 1, 2, 6, 8, 16, 24, 48, 100, 128, 512, 2080, 2304, 3000};
    return sizes[any(0, 13)];
}

template <int kCapacity, class Offset>
void check_join(bool split, Order order, bool garbage) {
    const int part_count = static_cast<int>(kCapacity <= kFewParts ? any(1, kCapacity) : any(1, any(0, 9) ? 12 : 256));
    const int64_t batch = any(0, any(0, 4) ? 12 : 200), longest = any(0, 9) * any(0, 9), before = any(0, 3);
    const int64_t row_bytes = part_count > 12 || batch > 12 ? 16 : any_row_bytes(), gap = any(0, 1) * any(0, 40);
    JoinParams p{};
    p.order = order;
    p.split = split;
    p.part_count = part_count;
    p.batch = batch;
    p.row_bytes = row_bytes;
    std::vector<std::vector<Offset>> offsets;
    std::vector<std::vector<int64_t>> lengths(part_count);
    std::vector<Buffer> parts;
    int64_t all_rows = 0;
    for (auto& own : lengths) {
        const int64_t most = any(0, 3) && part_count <= 12 ? longest : any(0, 3);
        for (int64_t b = 0; b < batch; ++b) own.push_back(any(0, 2) ? any(0, most) : 0);
        offsets.push_back(offsets_of<Offset>(own, before, garbage));
        parts.emplace_back(std::accumulate(own.begin(), own.end(), before) + any(0, 2), row_bytes, gap);
        all_rows += parts.back().rows;
    }
    Buffer joined(all_rows + any(0, 40), row_bytes, gap);
    for (int i = 0; i < part_count; ++i) p.parts.push_back({parts[i].view(), {offsets[i].data(), sizeof(Offset) == 8}});
    p.joined = joined.view();
    std::vector<Offset> joined_offsets(batch + 1, 77);
    p.joined_offsets = joined_offsets.data();
    const Tiling tiling(largest_unit(row_bytes, gap), row_bytes, all_rows, any(1, 100));
    std::vector<Buffer*> part_list;
    for (Buffer& part : parts) part_list.push_back(&part);
    if (split) {
        copy(SplitMap<kCapacity, Offset>(p, tiling), part_list, {&joined});
    } else {
        const JoinMap<kCapacity, Offset> map(p, tiling);
        const int64_t threads = map.kWritesOffsets ? map.tiling.count * 32 : 64;
        for (int64_t thread = 0; thread < threads; ++thread) map.write_offsets(thread, threads);
        copy(map, {&joined}, part_list);
    }
    if (garbage) return;

    std::vector<const char*> expected_joined(joined.rows, nullptr);
    std::vector<std::vector<const char*>> expected_part;
    for (const Buffer& part : parts) expected_part.emplace_back(part.rows, nullptr);
    for (int64_t b = 0, row = before * part_count; b < batch; ++b) {
        const auto put = [&](int i, int64_t t) {
            expected_joined[row] = parts[i].row(offsets[i][b] + t);
            expected_part[i][offsets[i][b] + t] = joined.row(row);
            ++row;
        };
        if (order == Order::kConcat) {
            for (int i = 0; i < part_count; ++i)
                for (int64_t t = 0; t < lengths[i][b]; ++t) put(i, t);
        } else {
            for (int64_t t = 0; t <= max_of<int64_t>(longest, 3); ++t)
                for (int i = 0; i < part_count; ++i)
                    if (t < lengths[i][b]) put(i, t);
        }
    }
    if (split) {
        for (int i = 0; i < part_count; ++i)
            for (int64_t row = 0; row < parts[i].rows; ++row) expect(parts[i], row, expected_part[i][row]);
        return;
    }
    for (int64_t row = 0; row < joined.rows; ++row) expect(joined, row, expected_joined[row]);
    for (int64_t b = 0; b <= batch; ++b) {
        int64_t sum = 0;
        for (int i = 0; i < part_count; ++i) sum += offsets[i][b];
        if (joined_offsets[b] != sum) fail("a wrong joined offset");
    }
}

template <class Offset>
void check_dense(bool to_jagged, bool garbage) {
    const int64_t batch = any(0, 20), longest = any(0, 50), max_len = any(0, 40), before = any(0, 3);
    const int64_t row_bytes = any_row_bytes(), gap = any(0, 1) * any(0, 40);
    std::vector<int64_t> lengths;
    for (int64_t b = 0; b < batch; ++b) lengths.push_back(any(0, 2) ? any(0, longest) : 0);
    const std::vector<Offset> offsets = offsets_of<Offset>(lengths, before, garbage);
    Buffer values(std::accumulate(lengths.begin(), lengths.end(), before) + any(0, 40), row_bytes, gap);
    Buffer dense(batch * max_len, row_bytes, gap);
    DenseParams p{};
    p.to_jagged = to_jagged;
    p.batch = batch;
    p.max_len = max_len;
    p.row_bytes = row_bytes;
    p.jagged = values.view();
    p.offsets = {offsets.data(), sizeof(Offset) == 8};
    p.dense = dense.data.data();
    p.dense_stride = dense.stride;
    p.batch_stride = max_len * dense.stride;
    p.padding = generator() * uint64_t{0x100000001};
    const Tiling tiling(largest_unit(row_bytes, gap), row_bytes, to_jagged ? values.rows : dense.rows, any(1, 100));
    if (to_jagged)
        copy(ToJaggedMap<Offset>(p, tiling), {&values}, {&dense});
    else
        copy(ToDenseMap<Offset>(p, tiling), {&dense}, {&values});
    if (garbage) return;

    std::vector<const char*> expected(to_jagged ? values.rows : dense.rows, nullptr);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t t = 0; t < min_of(lengths[b], max_len); ++t) {
            const int64_t row = offsets[b] + t, place = b * max_len + t;
            expected[to_jagged ? row : place] = to_jagged ? dense.row(place) : values.row(row);
        }
    for (int64_t row = 0; row < static_cast<int64_t>(expected.size()); ++row)
        expect(to_jagged ? values : dense, row, expected[row], to_jagged ? 0 : p.padding);
}

struct Boundaries {
    std::vector<int64_t> values;
    int64_t boundaries() const { return static_cast<int64_t>(values.size()); }
    int64_t at(const Tile&, int64_t i) const { return values[i]; }
};

// A row's sequence is found by a warp and from every place before it, among boundaries with many repetitions.
void check_searches() {
    for (int round = 0; round < 300; ++round) {
        Boundaries all;
        int64_t value = 0;
        for (int64_t i = any(0, round % 10 ? 70 : 40000); i > 0; --i) all.values.push_back(value += any(0, 3) / 2);
        for (int k = 0; k < 20; ++k) {
            const int64_t row = any(-1, value + 1);
            int64_t answer = 0;
            while (answer < all.boundaries() && all.values[answer] <= row) ++answer;
            if (search_by_warp(all, {0, 1, 1, row, 0}) != answer) fail("the search of a warp");
            const auto at = [&](int64_t i) { return all.values[i]; };
            if (first_beyond(at, any(0, answer), all.boundaries(), row) != answer) fail("the search of a thread");
        }
    }
}

// Tiles have their size and cover rows of every width, and units are told their rows.
void check_tilings() {
    for (int64_t row_units = 0; row_units < 3000; row_units += row_units < 1100 ? 1 : 97)
        for (const int64_t warps : {1, 5000, 50000, 5000000}) {
            const Tiling tiling(4, 4 * row_units, 5000, warps);
            const int units = min_of(tiling.rows, 32) * tiling.columns;
            if (units > Tiling::kMostUnits || tiling.columns * tiling.chunks < row_units) fail("a tile's size");
            if (tiling.rows > 1 && tiling.chunks > 1) fail("a tile of several rows that are not whole");
            for (int i = 0; i < 2 * Tiling::kMostUnits; ++i)
                if (tiling.row_of_unit(i) != i / tiling.columns) fail("the row of a unit");
        }
}

}  // namespace

int main() {
    check_tilings();
    check_searches();
    for (int round = 0; round < 120; ++round)
        for (const bool garbage : {false, true}) {
            for (const bool split : {false, true})
                for (const Order order : {Order::kConcat, Order::kInterleave}) {
                    check_join<kFewParts, int32_t>(split, order, garbage);
                    check_join<kFewParts, int64_t>(split, order, garbage);
                    if (round % 4 == 0) check_join<kMaxParts, int64_t>(split, order, garbage);
                    if (round % 4 == 1) check_join<kMaxParts, int32_t>(split, order, garbage);
                }
            for (const bool to_jagged : {false, true}) {
                check_dense<int32_t>(to_jagged, garbage);
                check_dense<int64_t>(to_jagged, garbage);
            }
        }
    return 0;
}
