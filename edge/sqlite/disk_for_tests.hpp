// A disk that can fail, for the tests of every database of the test program.
#pragma once

namespace bulkhead::sqlite {

extern int syncs;          // fdatasync calls so far
extern int failing_syncs;  // the next so many fail with EIO

}  // namespace bulkhead::sqlite
