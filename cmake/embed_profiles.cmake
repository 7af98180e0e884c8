# The twin's profiles as string literals, so that an installed binary needs no files of them. Runs itself as a script
# (-P) at build time whenever a YAML file changed.
if(CMAKE_SCRIPT_MODE_FILE)
  file(GLOB_RECURSE files ${ROOT}/twin/profiles/*.yaml)
  list(SORT files)
  set(text "#include \"twin/profile/embedded.hpp\"\n\nnamespace bulkhead::twin {\n\nconst std::vector<EmbeddedFile>& embedded_files() {\n  static const std::vector<EmbeddedFile> files = {\n")
  foreach(path IN LISTS files)
    file(RELATIVE_PATH name ${ROOT}/twin/profiles ${path})
    file(READ ${path} content HEX)
    string(LENGTH "${content}" digits)
    string(APPEND text "      {\"${name}\", std::string()")
    # Literals of at most 8 KiB each: compilers may refuse longer ones.
    set(at 0)
    while(at LESS digits)
      string(SUBSTRING "${content}" ${at} 16384 part)
      string(REGEX REPLACE "([0-9a-f][0-9a-f])" "\\\\x\\1" part "${part}")
      string(LENGTH "${part}" part_length)
      math(EXPR part_bytes "${part_length} / 4")
      string(APPEND text "\n           .append(\"${part}\", ${part_bytes})")
      math(EXPR at "${at} + 16384")
    endwhile()
    string(APPEND text "},\n")
  endforeach()
  string(APPEND text "  };\n  return files;\n}\n\n}  // namespace bulkhead::twin\n")
  file(WRITE ${OUT} "${text}")
  return()
endif()

file(GLOB_RECURSE profile_files CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/twin/profiles/*.yaml)
set(embedded ${CMAKE_BINARY_DIR}/generated/twin_profiles.cpp)
add_custom_command(OUTPUT ${embedded}
  COMMAND ${CMAKE_COMMAND} -DROOT=${CMAKE_SOURCE_DIR} -DOUT=${embedded} -P ${CMAKE_SOURCE_DIR}/cmake/embed_profiles.cmake
  DEPENDS ${profile_files} ${CMAKE_SOURCE_DIR}/cmake/embed_profiles.cmake
  COMMENT "Embedding the twin's profiles" VERBATIM)
target_sources(bulkhead_twin_profile PRIVATE ${embedded})
